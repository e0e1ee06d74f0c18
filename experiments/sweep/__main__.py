"""Trains many models: a sweep over posteriors, sizes, objectives, learning rates, seeds.

    python -m experiments.sweep --config=cifar10 --sweep=models --workdir=runs/models

A sweep is a function beside `get_config` in the configuration's file: `sweep_models` is
--sweep=models. It yields the fields that a trial sets. Fields for all trials are given as
--config.FIELD=VALUE. Each trial is a process of its own with the ordinary command line of
svae_jax.main, in a directory of its own under the workdir.

The same command continues a sweep that was stopped or killed; what is done is not done again. At
the end, and with --report at any time, the workdir receives sweep.csv, sweep.md and sweep.png.
"""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import options
from experiments.sweep import engines
from experiments.sweep import trial as trial_lib
from experiments.sweep import trials as trials_lib
from svae_jax.errors import UserError
from svae_jax.run import interrupt


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("sweep", None, "NAME of the function sweep_NAME in that file", values)
    options.define_path("workdir", "directory of the sweep and its trials", values)
    flags.DEFINE_bool("report", False, "write the report of a workdir, and run nothing", values)
    flags.DEFINE_bool("dry_run", False, "print the commands of the trials that are left", values)
    flags.DEFINE_string("metric", trial_lib.ELBO, "of metrics.jsonl, to compare by", values)
    flags.DEFINE_integer("retries", 2, "of a trial that fails", 0, flag_values=values)
    engines.define(values)
    flags.DEFINE_string("address", None, "of a Ray cluster, HOST:PORT or auto", values)
    pruned = "steps after which, and after 3 and 9 times as many, the lower two thirds stop (ASHA)"
    flags.DEFINE_integer("early_stopping", None, pruned, 1, flag_values=values)


def main(argv: Sequence[str]) -> int:
    """Runs a sweep, or reports on it; the exit code is 1 if a trial failed.

    Raises:
        UserError: a mistake in the options or in the sweep.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the trials have saved.
    """
    values = options.parse(argv, __doc__, _define, config="")
    workdir, metric = values.workdir, values.metric
    if not values.dry_run and importlib.util.find_spec("pandas") is None:
        raise UserError("a sweep's tables need pandas: pip install -e '.[sweep]'")
    if values.report:
        return _report(workdir, metric)
    if not (values.config and values.sweep):
        raise UserError("--config and --sweep are needed, or --report")
    chosen = engines.chosen(values)
    if not values.dry_run:
        engines.check(chosen)
    config, common = options.config_path(values), options.overrides(values)
    swept, num_devices = trials_lib.load(config, values.sweep), max(1, int(values.gpus or 1))
    trials = trials_lib.make(config, swept, workdir, common, num_devices=num_devices)
    trials_lib.claim(workdir, values.sweep, config, trials)
    if values.dry_run:
        left = [trial for trial in trials if trial.outcome().status not in trial_lib.ENDED]
        print("".join(f"{shlex.join(trial.command())}\n" for trial in left), end="")
        return 0
    try:
        engines.run(trials, workdir, chosen)
    except interrupt.Stopped:
        _report(workdir, metric)
        raise
    return _report(workdir, metric)


def _report(workdir: Path, metric: str) -> int:
    """Writes the report, prints where it is, and what failed; returns the exit code."""
    from experiments.sweep import results  # imports pandas

    title, trials = trials_lib.read(workdir)
    found = [trial.outcome() for trial in trials]
    written = results.write(workdir, title, found, metric)
    print(f"written: {', '.join(map(str, written))}")
    failed = [outcome for outcome in found if outcome.status == trial_lib.FAILED]
    for outcome in failed:
        print(f"failed: {outcome.trial.name}: {outcome.reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    options.run_command(main)
