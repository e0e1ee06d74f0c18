"""Trains many models: a sweep over posteriors, sizes, objectives, learning rates, seeds.

    python -m experiments.sweep --config=configs/cifar10.py --sweep=models --workdir=runs/models

A sweep is a function beside `get_config` in the configuration's file: `sweep_models` is
--sweep=models. It yields the fields that a trial sets. Fields for all trials are given as
--config.FIELD=VALUE. Each trial is a process of its own with the ordinary command line of
svae_jax.main, in a directory of its own under the workdir.

The same command continues a sweep that was stopped or killed; what is done is not done again. At
the end, and with --report at any time, the workdir receives sweep.csv, sweep.md and sweep.png.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.options import Parser, nonempty_path, run_command
from experiments.sweep import engines, outcomes, report
from experiments.sweep import trials as trials_lib
from experiments.sweep.outcomes import Metric
from svae_jax.errors import UserError
from svae_jax.run import interrupt


def main(argv: Sequence[str]) -> int:
    """Runs a sweep, or reports on it; the exit code is 1 if a trial failed.

    Raises:
        UserError: a mistake in the options or in the sweep.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the trials have saved.
    """
    options, overrides = _parse(argv)
    metric = Metric.of(options.metric, options.mode)
    if options.report:
        return _report(options.workdir, metric)
    if not (options.config and options.sweep):
        raise UserError("--config and --sweep are needed, or --report")
    chosen = engines.Options(
        options.engine,
        metric,
        options.retries,
        options.address,
        options.cpus,
        options.gpus,
        options.early_stopping,
    )
    if not options.dry_run:
        engines.check(chosen)
    trials = trials_lib.make(
        options.config,
        trials_lib.load(options.config, options.sweep),
        options.workdir,
        overrides,
        num_devices=max(1, int(options.gpus or 1)),
    )
    trials_lib.claim(options.workdir, options.sweep, options.config, trials)
    if options.dry_run:
        for trial in trials:
            if outcomes.read(trial).status not in outcomes.ENDED:
                print(shlex.join(trial.command()))
        return 0
    try:
        engines.run(trials, options.workdir, chosen)
    except interrupt.Stopped:
        _report(options.workdir, metric)
        raise
    return _report(options.workdir, metric)


def _report(workdir: Path, metric: Metric) -> int:
    """Writes the report, prints where it is, and what failed; returns the exit code."""
    title, trials = trials_lib.read(workdir)
    found = [outcomes.read(trial) for trial in trials]
    written = report.write(workdir, title, found, metric)
    print(f"written: {', '.join(str(path) for path in written)}")
    failed = [outcome for outcome in found if outcome.status == outcomes.FAILED]
    for outcome in failed:
        print(f"failed: {outcome.trial.name}: {outcome.reason}", file=sys.stderr)
    return 1 if failed else 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("sweep", __doc__)
    option = parser.add_argument
    option("--config", help="configuration, such as configs/cifar10.py or configs/cifar10.py:mvn")
    option("--sweep", help="NAME of the function sweep_NAME in that file")
    option(
        "--workdir", type=nonempty_path, required=True, help="directory of the sweep and its trials"
    )
    option("--report", action="store_true", help="write the report of a workdir, and run nothing")
    option("--dry_run", action="store_true", help="print the commands of the trials that are left")
    option(
        "--metric",
        default=outcomes.ELBO.name,
        help="number of metrics.jsonl to compare by (default: %(default)s)",
    )
    option("--mode", choices=("max", "min"), help="whether higher or lower is better (by its name)")
    option("--retries", type=_whole(0), default=2, help="of a trial that fails (default: 2)")
    option(
        "--engine",
        choices=engines.NAMES,
        default="ray",
        help="ray: as many trials at a time as fit; local: one after another, without Ray",
    )
    option("--address", help="of a Ray cluster, HOST:PORT or auto (default: this machine)")
    option(
        "--cpus",
        type=_whole(1),
        help="CPU cores of a trial (default: the GPU's share, else the whole machine)",
    )
    option("--gpus", type=_gpus, help="GPUs of a trial; a fraction shares one (default: 1)")
    option(
        "--early_stopping",
        type=_whole(1),
        metavar="STEPS",
        help="stop trials whose metric is in the lower two thirds after STEPS, 3 STEPS, 9 STEPS "
        "(ASHA)",
    )
    return parser.parse_known_args(argv)


def _whole(least: int) -> type:
    class Whole(int):
        def __new__(cls, text: str) -> "Whole":
            value = super().__new__(cls, text)
            if value < least:
                raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
            return value

    return Whole


def _gpus(text: str) -> float:
    value = float(text)
    if not (0 <= value < 1 or value.is_integer()):
        raise argparse.ArgumentTypeError(
            f"must be a fraction below 1 or a whole number, got {text}"
        )
    return value


if __name__ == "__main__":
    run_command(main)
