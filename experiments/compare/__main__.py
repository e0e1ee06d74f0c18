"""Compares the posteriors on equal terms: equal decoders, one objective, several seeds.

    python -m experiments.compare --config=cifar10 --workdir=runs/compare
    python -m experiments.compare --config=shapes --workdir=runs/compare --quick

For each objective and model it chooses a learning rate on a tenth of the training split, trains one
run a seed on all of it, fits the samplers to each run, and evaluates each once on the held-out
split. All else is the configuration, and --config.FIELD=VALUE changes it for all runs.

The workdir receives comparison.json (all numbers) and comparison.md (the tables), new after each
seed, and for the first seed comparison.png (reconstructions and samples) and curves.png (the
held-out ELBO over epochs and minutes). The same command continues a comparison that was stopped or
killed; what is done is not done again.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import options, study
from experiments.compare import curves, figure, page, plan, summary
from experiments.compare.plan import PlannedRun, Setting
from experiments.sweep import engines
from experiments.sweep import trials as trials_lib
from experiments.sweep.trial import DONE, ELBO, POSTERIOR, Options, Trial
from svae_jax import files
from svae_jax.analysis import evaluating
from svae_jax.errors import UserError
from svae_jax.files import os_errors_for_user

Trials = dict[PlannedRun, Trial]


def _define(values: flags.FlagValues) -> None:
    options.define_path("workdir", "directory of the comparison and its runs", values)
    flags.DEFINE_bool("quick", False, f"minutes instead of hours: {plan.QUICK}", values)
    flags.DEFINE_string("split", "", "held-out split of the tables (dataset.eval_split)", values)
    flags.DEFINE_string("features", "", "inception or efficientnet_lite0, as of evaluate", values)
    # A comma stands before a model's options.
    models = "after the config's colon: lowrank,rank=2"
    options.define_list("models", None, models, values, separator=" ")
    options.define_list("scalings", None, "of the objective", values)
    rates = "tried for each model; one is for all, '' is the config's"
    options.define_list("learning_rates", None, rates, values)
    options.define_list("samplers", None, "fitted to each run", values)
    for name, least, meaning in (
        ("search_steps", 0, "training steps of each run of that search; 0: of all runs"),
        ("seeds", 1, "runs of each model"),
        ("flow_steps", 0, "training steps of the sampler flow; 0: its default"),
        ("importance_samples", 1, "K of the importance-weighted bound"),
        ("num_samples", 1, "images drawn from each sampler"),
    ):
        flags.DEFINE_integer(name, None, meaning, least, flag_values=values)
    engines.define(values)


def main(argv: Sequence[str]) -> None:
    """Runs or continues a comparison.

    Raises:
        UserError: a mistake in the options, or a run, fit or evaluation that failed.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the runs have saved.
    """
    values = options.parse(argv, __doc__, _define, config="")
    setting, file = _setting(values), options.config_path(values).partition(":")[0]
    common, engine = options.overrides(values), engines.chosen(values)
    if setting.num_steps:
        common = {"num_steps": setting.num_steps, **common}
    engines.check(engine)
    rates = _given_rates(file, setting, common)
    search = _search(values, setting, common, engine)
    rates |= plan.best_rates(search)
    directory = values.workdir / "runs"
    trials = _trials(file, plan.final_runs(setting, rates), directory, common)
    records: list[dict[str, Any]] = []
    for seed in range(setting.seeds):
        of_seed = {run: trial for run, trial in trials.items() if run.seed == seed}
        elbos = _train(of_seed, directory, engine)
        for run, trial in of_seed.items():
            if elbos[run] is None:
                raise UserError(f"{trial.name} failed: {trial.outcome().reason}")
            records.append(_finish(run, trial, setting, values))
        settings = _settings(values, setting, directory / records[0]["workdir"], argv)
        tried = [{**run._asdict(), "elbo": elbo} for run, elbo in search.items()]
        content = {"settings": settings, "search": tried, "runs": records}
        study.write(values.workdir / "comparison", content, page.render)
    path = values.workdir / "curves.png"
    with os_errors_for_user(f"{path} cannot be written"):
        curves.draw(records).savefig(path)
    # Last: from here on this process holds the device.
    _draw(values, setting, trials)


def _given_rates(file: str, setting: Setting, common: Mapping[str, Any]) -> plan.Rates:
    """The only learning rate of the setting for all, or of each model the configured one.

    Raises:
        UserError: the configuration lacks a model.
    """
    found = {}
    for model, scaling in setting.pairs:
        try:
            configured = options.load(f"{file}:{model}", common).optimizer.learning_rate
        except UserError as error:
            raise UserError(f"{error} (--models says what is compared)") from None
        found[model, scaling] = (*setting.learning_rates, configured)[0]
    return found


def _trials(
    file: str, runs: Sequence[PlannedRun], directory: Path, common: Mapping[str, Any]
) -> Trials:
    overrides = [{POSTERIOR: run.model, **run.overrides} for run in runs]
    made = trials_lib.make(file, overrides, directory, common)
    trials_lib.claim(directory, "comparison", file, made)
    return dict(zip(runs, made, strict=True))


def _train(trials: Trials, directory: Path, engine: Options) -> plan.Elbos:
    found = engines.run(list(trials.values()), directory, engine)
    elbos = [outcome.metrics[ELBO] if outcome.status == DONE else None for outcome in found]
    return dict(zip(trials, elbos, strict=True))


def _search(
    values: flags.FlagValues, setting: Setting, common: Mapping[str, Any], engine: Options
) -> plan.Elbos:
    """Trains with each learning rate on nine tenths of the training split, if there are several."""
    if len(setting.learning_rates) < 2:
        return {}
    fields = {**common, **plan.search_split(values.config.dataset.split)}
    if setting.search_steps:
        fields["num_steps"] = setting.search_steps
    file, directory = options.config_path(values).partition(":")[0], values.workdir / "search"
    trials = _trials(file, plan.search_runs(setting), directory, fields)
    return _train(trials, directory, engine)


def _finish(
    run: PlannedRun, trial: Trial, setting: Setting, values: flags.FlagValues
) -> dict[str, Any]:
    """Fits the samplers to a run and evaluates it, as far as that is not done, in own processes."""
    workdir = f"--workdir={trial.workdir}"
    for name in setting.samplers:
        is_flow = name == "flow" and setting.flow_steps
        steps = [f"--config.flow.num_steps={setting.flow_steps}"] if is_flow else []
        _command("fit_sampler", workdir, f"--sampler={name}", *steps)
    wanted = {
        "split": values.split,
        "importance_samples": setting.importance_samples,
        "num_samples": setting.num_samples,
        "features": values.features,
    }
    result = files.read_json(trial.workdir / "result.json") or {}
    evaluation = evaluating.read(trial.workdir, values.split)
    if not _is_current(evaluation, wanted, result["step"], setting.samplers):
        _command("evaluate", workdir, *(f"--{k}={v}" for k, v in wanted.items()))
        evaluation = evaluating.read(trial.workdir, values.split)
    assert evaluation is not None  # it was written, or the command has failed
    return {
        **run._asdict(),
        "latent": summary.latent(evaluation["config"]["latent"]),
        "workdir": trial.name,
        "curve": curves.of_run(trial.workdir, evaluation["config"]["batch_size"]),
        "figures": summary.figures_of_run(result, evaluation),
    }


def _is_current(
    evaluation: dict[str, Any] | None, wanted: dict[str, Any], step: int, samplers: Sequence[str]
) -> bool:
    """Whether an earlier evaluation is of this step, these settings and these samplers."""
    return (
        evaluation is not None
        and evaluation["step"] == step
        and wanted.items() <= evaluation["settings"].items()
        and {*samplers} <= evaluation["samples"].keys()
        and "floors" in evaluation  # an older version's has none, nor the bounds of samplers
        and "bounds" in evaluation["samples"]["prior"]
    )


def _command(name: str, *arguments: str) -> None:
    """Runs a command of the package in a process of its own.

    Raises:
        UserError: it failed; it has said why.
    """
    command = [sys.executable, "-m", f"svae_jax.{name}", *arguments]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise UserError(f"{shlex.join(['python', *command[1:]])} ended with exit code {code}")


def _settings(
    values: flags.FlagValues, setting: Setting, first: Path, argv: Sequence[str]
) -> dict[str, Any]:
    """How the comparison was made, from the workdir of the first of its runs."""
    result = files.read_json(first / "result.json") or {}
    evaluation = evaluating.read(first, values.split) or {}
    is_searched = len(setting.learning_rates) > 1
    split = plan.search_split(values.config.dataset.split) if is_searched else {}
    return {
        **study.settings("compare", argv, values.config, result),
        "split": evaluation["split"],
        "num_images": evaluation["num_images"],
        "search_split": split.get("dataset.eval_split", ""),
        "search_steps": setting.search_steps or result["step"],
        "samplers": ["prior", *setting.samplers],
        "importance_samples": setting.importance_samples,
        "num_samples": setting.num_samples,
        "features": values.features,
    }


def _draw(values: flags.FlagValues, setting: Setting, trials: Trials) -> None:
    """Writes `comparison.png` of the runs of seed 0 with the first of the objectives."""
    directories = {
        run.model: trial.workdir
        for run, trial in trials.items()
        if run.seed == 0 and run.scaling == setting.scalings[0]
    }
    rows = figure.strips(directories, ["prior", *setting.samplers], values.split)
    path = values.workdir / "comparison.png"
    with os_errors_for_user(f"{path} cannot be written"):
        figure.save(path, rows)
    print(f"written: {path}")


def _setting(values: flags.FlagValues) -> Setting:
    """The quick or the full setting, with what the flags change.

    Raises:
        UserError: a value is not allowed.
    """
    given = {name: values[name].value for name in Setting._fields if name in values}
    changed: dict[str, Any] = {
        k: tuple(x) if isinstance(x, list) else x for k, x in given.items() if x is not None
    }
    if "learning_rates" in changed:
        try:
            changed["learning_rates"] = tuple(map(float, changed["learning_rates"]))
        except ValueError as error:
            raise UserError(f"--learning_rates: {error}") from None
    setting = (plan.QUICK if values.quick else plan.FULL)._replace(**changed)
    for name in ("scalings", "samplers"):
        known = getattr(plan.FULL, name)
        if unknown := {*getattr(setting, name)} - {*known}:
            raise UserError(f"--{name}={min(unknown)} must be among {', '.join(known)}")
    return setting


if __name__ == "__main__":
    options.run_command(main)
