"""Runs the trials of a sweep, with Ray Tune or one after another."""

import collections
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.sweep import trial as trial_lib
from experiments.sweep.board import Board
from experiments.sweep.trial import IsStopped, Options, Outcome, Trial
from svae_jax.errors import UserError
from svae_jax.run import interrupt, workdir

_DEFAULT = Options()


def define(values: flags.FlagValues) -> None:
    """Defines the flags of a command that runs trials."""
    engine = "ray: as many trials at a time as fit; local: one after another, without Ray"
    flags.DEFINE_enum("engine", "ray", ["ray", "local"], engine, values)
    cpus = "CPU cores of a trial (default: the GPU's share, else the whole machine)"
    flags.DEFINE_integer("cpus", None, cpus, 1, flag_values=values)
    gpus = "GPUs of a trial; a fraction shares one (default: 1)"
    flags.DEFINE_float("gpus", None, gpus, flag_values=values)
    flags.register_validator(
        "gpus",
        lambda gpus: gpus is None or 0 <= gpus < 1 or gpus.is_integer(),
        "must be a fraction below 1 or a whole number",
        values,
    )


def chosen(values: flags.FlagValues) -> Options:
    """The options that the command line gives."""
    names = {field.name for field in dataclasses.fields(Options)} & {*values}
    given: dict[str, Any] = {name: values[name].value for name in names}
    return Options(**given)


def check(options: Options) -> None:
    """Checks that the engine is there, and that the options are for it.

    Raises:
        UserError: it is not, or they are not.
    """
    if options.engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError(
            "--engine=ray: Ray is not installed; pip install -e '.[sweep]' installs it, and "
            "--engine=local runs the trials one after another without it"
        )
    for name in ("address", "cpus", "gpus", "early_stopping"):
        if options.engine != "ray" and (value := getattr(options, name)) is not None:
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
        before = [trial.outcome() for trial in trials]
        left = [outcome.trial for outcome in before if outcome.status not in trial_lib.ENDED]
        run_all: Callable[..., None] = _run_locally
        if left and options.engine == "ray":
            from experiments.sweep import ray_tune  # imports Ray

            run_all = ray_tune.run
        if left:
            with Board(before, options.metric) as board:
                run_all(left, directory, options, board, lambda: bool(request.signal_number))
        if request.signal_number is not None:
            raise interrupt.Stopped(request.signal_number, "the trials have saved")
    return [trial.outcome() for trial in trials]


def _run_locally(
    trials: Sequence[Trial], _: Path, options: Options, board: Board, is_stopped: IsStopped
) -> None:
    """Runs one trial after another, each on all of this machine."""
    waiting = [(trial, options.retries) for trial in reversed(trials)]
    while waiting and not is_stopped():
        trial, retries = waiting.pop()
        board.begin(trial)
        try:
            collections.deque(trial_lib.train(trial, is_stopped), maxlen=0)  # to its end
        except trial_lib.TrialFailed as failure:
            if retries and not failure.is_final:
                board.repeat(trial)
                waiting.append((trial, retries - 1))
        board.end(trial)
