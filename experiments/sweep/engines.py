"""Engines: how the trials of a sweep are run, with Ray Tune or one after another."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.sweep import outcomes, process
from experiments.sweep.board import Board
from experiments.sweep.outcomes import Metric, Outcome
from experiments.sweep.trials import Trial
from svae_jax.errors import UserError
from svae_jax.run import interrupt, workdir

NAMES = ("ray", "local")


@dataclasses.dataclass(frozen=True)
class Options:
    """How trials are run. All but `metric` and `retries` are for Ray.

    Attributes:
        engine: of `NAMES`.
        metric: shown, and by which trials are pruned.
        retries: how often a trial that fails is started again; never after a user's mistake.
        address: of a running Ray cluster; None starts one on this machine.
        cpus: of a trial; None: an equal share of a machine with GPUs, else the whole machine.
        gpus: of a trial, a fraction or a whole number; None: one, where there are any.
        early_stopping: prunes by ASHA, after so many steps for the first time.
    """

    engine: str = "ray"
    metric: Metric = Metric()
    retries: int = 2
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    early_stopping: int | None = None


class Stopped(Exception):
    """The sweep was asked to stop, and its trials have saved."""

    def __init__(self, signal_number: int):
        super().__init__("stopped: the trials have saved; the same command continues")
        self.exit_code = 128 + signal_number


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


def run(
    trials: Sequence[Trial], directory: Path, options: Options = Options()
) -> list[Outcome]:
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
        Stopped: after SIGTERM or Ctrl-C, once the trials have saved.
    """
    check(options)
    workdir.create(directory)
    with workdir.locked(directory), interrupt.listening() as request:
        before = [outcomes.read(trial) for trial in trials]
        left = [outcome.trial for outcome in before if outcome.status not in outcomes.ENDED]
        if left:
            with Board(before, options.metric) as board:
                _engine(options)(left, directory, options, board, request)
        if request.signal_number is not None:
            raise Stopped(request.signal_number)
    return [outcomes.read(trial) for trial in trials]


def _engine(options: Options) -> Callable[..., None]:
    if options.engine == "local":
        return _one_after_another
    from experiments.sweep import ray_tune  # imports Ray

    return ray_tune.run


def _one_after_another(
    trials: Sequence[Trial],
    directory: Path,
    options: Options,
    board: Board,
    request: interrupt.Request,
) -> None:
    """Runs each trial on all of this machine."""
    del directory
    for trial in trials:
        if request.signal_number is not None:
            return
        board.started(trial)
        for attempt in range(options.retries + 1):
            try:
                for _ in process.train(trial, lambda: request.signal_number is not None):
                    board.refresh()
                break
            except process.TrialFailed as failure:
                if failure.is_final or attempt == options.retries:
                    break
                board.print(f"{trial.name} failed and is started again: {failure}")
        board.ended(trial)
