"""Compares the posteriors on equal terms: equal decoders, one objective, several seeds.

    python -m experiments.compare --config=configs/cifar10.py --workdir=runs/compare
    python -m experiments.compare --config=configs/shapes.py --workdir=runs/compare --quick

For each objective and model it chooses a learning rate on a tenth of the training split, trains one
run a seed on all of it, fits the samplers to each run, and evaluates each once on the held-out
split. All else is the configuration, and --config.FIELD=VALUE changes it for all runs.

The workdir receives comparison.json (all numbers) and comparison.md (the tables), new after each
seed, and comparison.png (reconstructions and samples of seed 0). The same command continues a
comparison that was stopped or killed; what is done is not done again.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from experiments.compare import figure, plan, summary, tables
from experiments.compare.plan import Run, Setting
from experiments.options import Parser, nonempty_path, run_command
from experiments.sweep import engines, outcomes
from experiments.sweep import trials as trials_lib
from experiments.sweep.trials import Trial
from svae_jax import command_line
from svae_jax.analysis import assessment
from svae_jax.errors import UserError
from svae_jax.files import os_errors_for_user
from svae_jax.run import workdir as workdirs


def main(argv: Sequence[str]) -> None:
    """Runs or continues a comparison.

    Raises:
        UserError: a mistake in the options, or a run, fit or evaluation that failed.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the runs have saved.
    """
    options, common = _parse(argv)
    setting = _setting(options)
    config, fixed = command_line.load_config(options.config, common)
    if setting.num_steps and "num_steps" not in fixed:
        common = [*common, f"--config.num_steps={setting.num_steps}"]
    engine = engines.Options(options.engine, gpus=options.gpus, cpus=options.cpus)
    engines.check(engine)
    file = options.config.partition(":")[0]
    _check_models(file, dict.fromkeys(model for model, _ in setting.pairs), common)
    search = plan.Search({}, "")
    if len(setting.learning_rates) > 1:
        search = _search(file, config, setting, options.workdir / "search", common, engine)
        rates = plan.best_rates(search.elbos)
    else:
        rates = _given_rates(file, setting, common)
    runs = list(plan.final_runs(setting, rates))
    directory = options.workdir / "runs"
    trials = _trials(file, runs, directory, common)
    records: list[dict[str, Any]] = []
    for seed in range(setting.seeds):
        of_seed = {run: trial for run, trial in trials.items() if run.seed == seed}
        elbos = _train(of_seed, directory, engine)
        for run, trial in of_seed.items():
            if elbos[run] is None:
                raise UserError(f"{trial.name} failed: {outcomes.read(trial).reason}")
            records.append(_finish(run, trial, setting, options))
        _write(options, setting, search, records, argv)
    # Last: from here on this process holds the device.
    _draw(options, setting, {run: trial for run, trial in trials.items() if run.seed == 0})


def _check_models(file: str, models: Iterable[str], common: Sequence[str]) -> None:
    """Raises UserError unless the configuration has all models."""
    for model in models:
        try:
            command_line.load_config(f"{file}:{model}", common)
        except UserError as error:
            raise UserError(f"{error} (--models says what is compared)") from None


def _given_rates(
    file: str, setting: Setting, common: Sequence[str]
) -> dict[tuple[str, str], float]:
    """(model, scaling) -> the only learning rate of the setting, or the model's configured one."""

    def configured(model: str) -> float:
        return command_line.load_config(f"{file}:{model}", common)[0].optimizer.learning_rate

    single = setting.learning_rates[0] if setting.learning_rates else None
    return {pair: configured(pair[0]) if single is None else single for pair in setting.pairs}


def _trials(
    file: str, runs: Sequence[Run], directory: Path, common: Sequence[str]
) -> dict[Run, Trial]:
    overrides = [{trials_lib.POSTERIOR: run.model, **run.overrides} for run in runs]
    made = trials_lib.make(file, overrides, directory, common)
    trials_lib.claim(directory, "comparison", file, made)
    return dict(zip(runs, made, strict=True))


def _train(
    trials: dict[Run, Trial], directory: Path, engine: engines.Options
) -> dict[Run, float | None]:
    """The held-out ELBO of each run; None where it failed."""
    found = engines.run(list(trials.values()), directory, engine)
    done = [outcome.status == outcomes.DONE for outcome in found]
    elbos = [o.metrics["eval/elbo"] if d else None for o, d in zip(found, done, strict=True)]
    return dict(zip(trials, elbos, strict=True))


def _search(
    file: str,
    config: ml_collections.ConfigDict,
    setting: Setting,
    directory: Path,
    common: Sequence[str],
    engine: engines.Options,
) -> plan.Search:
    """Trains with each learning rate on nine tenths of the training split."""
    splits = plan.search_split(config.dataset.split)
    fields = {**splits, **({"num_steps": setting.search_steps} if setting.search_steps else {})}
    arguments = [*common, *(f"--config.{field}={value}" for field, value in fields.items())]
    trials = _trials(file, plan.search_runs(setting), directory, arguments)
    return plan.Search(_train(trials, directory, engine), splits["dataset.eval_split"])


def _finish(
    run: Run, trial: Trial, setting: Setting, options: argparse.Namespace
) -> dict[str, Any]:
    """Fits the samplers to a run and evaluates it, as far as that is not done, in own processes."""
    directory = str(trial.workdir)
    for name in setting.samplers:
        is_flow = name == "flow" and setting.flow_steps
        steps = [f"--config.flow.num_steps={setting.flow_steps}"] if is_flow else []
        _command("fit_sampler", f"--workdir={directory}", f"--sampler={name}", *steps)
    wanted = {
        "split": options.split,
        "importance_samples": setting.importance_samples,
        "num_samples": setting.num_samples,
        "features": options.features,
    }
    result = workdirs.read_json(trial.workdir / "result.json") or {}
    evaluation = assessment.read(trial.workdir, options.split)
    if not _is_current(evaluation, wanted, result["step"], setting.samplers):
        _command("evaluate", f"--workdir={directory}", *(f"--{k}={v}" for k, v in wanted.items()))
        evaluation = assessment.read(trial.workdir, options.split)
    return {
        **run._asdict(),
        "latent": summary.latent(evaluation["config"]["latent"]),
        "workdir": trial.name,
        "num_steps": result["step"],
        "num_images": evaluation["num_images"],
        "split": evaluation["split"],
        "dataset": evaluation["config"]["dataset"]["name"],
        "batch_size": evaluation["config"]["batch_size"],
        "device": result["device"],
        "versions": result["versions"],
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
        and "floors" in evaluation  # an older version's has none
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


def _write(
    options: argparse.Namespace,
    setting: Setting,
    search: plan.Search,
    records: list[dict[str, Any]],
    argv: Sequence[str],
) -> None:
    """Writes `comparison.json`, and `comparison.md` from it."""
    first = records[0]
    shared = ("dataset", "split", "num_images", "num_steps", "batch_size", "versions")
    content = {
        "settings": {
            **{name: first[name] for name in shared},
            "search_split": search.split,
            "search_steps": setting.search_steps or first["num_steps"],
            "samplers": ["prior", *setting.samplers],
            "importance_samples": setting.importance_samples,
            "num_samples": setting.num_samples,
            "features": options.features,
            "device": summary.device(first["device"]),
            "command": shlex.join(["python", "-m", "experiments.compare", *argv]),
        },
        "search": search.to_json(),
        "runs": [
            {k: v for k, v in record.items() if k not in (*shared, "device")} for record in records
        ],
    }
    workdirs.write_json(options.workdir / "comparison.json", content)
    path = options.workdir / "comparison.md"
    with os_errors_for_user(f"{path} cannot be written"):
        path.write_text(tables.render(content))
    print(f"written: {path}")


def _draw(options: argparse.Namespace, setting: Setting, trials: dict[Run, Trial]) -> None:
    """Writes `comparison.png` of the runs with the first of the objectives."""
    directories = {
        run.model: trial.workdir
        for run, trial in trials.items()
        if run.scaling == setting.scalings[0]
    }
    rows = figure.strips(directories, ["prior", *setting.samplers], options.split)
    path = options.workdir / "comparison.png"
    with os_errors_for_user(f"{path} cannot be written"):
        figure.save(path, rows)
    print(f"written: {path}")


def _setting(options: argparse.Namespace) -> Setting:
    """The quick or the full setting, with what the options change.

    Raises:
        UserError: an option is not allowed.
    """
    given = {name: getattr(options, name, None) for name in Setting._fields}
    changed = {name: value for name, value in given.items() if value is not None}
    setting = (plan.QUICK if options.quick else plan.FULL)._replace(**changed)
    if unknown := {*setting.scalings} - {*plan.FULL.scalings}:
        raise UserError(f"--scalings={min(unknown)} must be among {', '.join(plan.FULL.scalings)}")
    if unknown := {*setting.samplers} - {*plan.FULL.samplers}:
        raise UserError(f"--samplers={min(unknown)} must be among {', '.join(plan.FULL.samplers)}")
    for name, least in (
        ("seeds", 1),
        ("search_steps", 0),
        ("flow_steps", 0),
        ("importance_samples", 1),
    ):
        if (value := getattr(setting, name)) < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    return setting


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _models(text: str) -> tuple[str, ...]:
    """Models are separated by blanks: a comma stands before a model's options."""
    return tuple(text.split())


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in _words(text))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those that begin with --config., which are for all runs."""
    parser = Parser("compare", __doc__)
    option = parser.add_argument
    option("--config", required=True, help="configuration, such as configs/cifar10.py")
    option(
        "--workdir",
        type=nonempty_path,
        required=True,
        help="directory of the comparison and its runs",
    )
    option("--quick", action="store_true", help=f"minutes instead of hours: {plan.QUICK}")
    option("--split", default="", help="held-out split of the tables (dataset.eval_split)")
    option(
        "--features", default="", help="inception or efficientnet_lite0, as of svae_jax.evaluate"
    )
    option("--models", type=_models, help="separated by blanks: 'vector lowrank,rank=2'")
    option("--scalings", type=_words, help="of the objective, separated by commas")
    option("--learning_rates", type=_numbers, help="tried; one is for all, '' is the config's")
    option("--search_steps", type=int, help="updates of each run of that search; 0: of all runs")
    option("--seeds", type=int, help="runs of each model")
    option("--samplers", type=_words, help="fitted to each run, separated by commas")
    option("--flow_steps", type=int, help="updates of the sampler flow; 0: its default")
    option("--importance_samples", type=int, help="K of the importance-weighted bound")
    option("--num_samples", type=int, help="images drawn from each sampler")
    option("--engine", choices=engines.NAMES, default="ray", help="see experiments.sweep")
    option("--cpus", type=int, help="CPU cores of a run")
    option("--gpus", type=float, help="GPUs of a run")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    run_command(main)
