"""Runs the trials of a sweep, with Ray Tune or one after another."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from experiments.sweep import process
from experiments.sweep import trial as trial_lib
from experiments.sweep.board import Board
from experiments.sweep.trial import Options, Outcome, Trial
from svae_jax.errors import UserError
from svae_jax.run import interrupt, workdir

NAMES = ("ray", "local")
_DEFAULT = Options()


def define(values: flags.FlagValues) -> None:
    """Defines the flags of a command that runs trials."""
    flags.DEFINE_enum(
        "engine",
        NAMES[0],
        NAMES,
        "ray: as many trials at a time as fit; local: one after another, without Ray",
        values,
    )
    flags.DEFINE_integer(
        "cpus",
        None,
        "CPU cores of a trial (default: the GPU's share, else the whole machine)",
        1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "gpus", None, "GPUs of a trial; a fraction shares one (default: 1)", flag_values=values
    )
    flags.register_validator(
        "gpus",
        lambda gpus: gpus is None or 0 <= gpus < 1 or gpus.is_integer(),
        "must be a fraction below 1 or a whole number",
        values,
    )


def check(options: Options) -> None:
    """Checks that the engine is there, and that the options are for it.

    Raises:
        UserError: it is not, or they are not.
    """
    if options.engine == "ray":
        if importlib.util.find_spec("ray") is None:
            raise UserError(
                "--engine=ray: Ray is not installed; pip install -e '.[sweep]' installs it, and "
                "--engine=local runs the trials one after another without it"
            )
        return
    for name in ("address", "cpus", "gpus", "early_stopping"):
        if (value := getattr(options, name)) is not None:
            raise UserError(f"--{name}={value} needs --engine=ray")


def run(trials: Sequence[Trial], directory: Path, options: Options = _DEFAULT) -> list[Outcome]:
    """Runs trials to their end, except those that are done or pruned; progress is on stderr.

    A trial that fails does not stop the others: see its outcome.

    Args:
        trials: see `trials.make`.
        directory: the sweep's, in which Ray may write; one process at a time runs a sweep.
        options: see `Options`.

    Returns:
        The outcome of each trial, in their order.

    Raises:
        UserError: a mistake in the options, no Ray at the address, or resources that no node has.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the trials have saved.
    """
    check(options)
    workdir.create(directory)
    with workdir.locked(directory), interrupt.listening() as request:

        def should_stop() -> bool:
            return request.signal_number is not None

        before = [trial.outcome() for trial in trials]
        left = [outcome.trial for outcome in before if outcome.status not in trial_lib.ENDED]
        board = Board(before, options.metric)
        if left and options.engine == "local":
            with board:
                for trial in left:
                    _run_one(trial, options.retries, board, should_stop)
        elif left:
            from experiments.sweep import ray_tune  # imports Ray

            ray_tune.run(left, directory, options, board, should_stop)
        if request.signal_number is not None:
            raise interrupt.Stopped(request.signal_number, "the trials have saved")
    return [trial.outcome() for trial in trials]


def _run_one(trial: Trial, retries: int, board: Board, should_stop: Callable[[], bool]) -> None:
    """Runs a trial on all of this machine."""
    for attempt in range(retries + 1):
        if should_stop():
            return
        board.started(trial)
        try:
            for _ in process.train(trial, should_stop):
                pass
            break
        except process.TrialFailed as failure:
            if failure.is_final or attempt == retries:
                break
            board.will_be_repeated(trial)
    board.ended(trial)
