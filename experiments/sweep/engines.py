"""Engines: how the trials of a sweep are run, with Ray Tune or one after another."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.sweep import outcomes, process
from experiments.sweep.board import Board
from experiments.sweep.outcomes import Metric, Outcome
from experiments.sweep.trial import Trial
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
    metric: Metric = outcomes.ELBO
    retries: int = 2
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    early_stopping: int | None = None


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


def run(trials: Sequence[Trial], directory: Path, options: Options = Options()) -> list[Outcome]:
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
        before = [outcomes.read(trial) for trial in trials]
        left = [outcome.trial for outcome in before if outcome.status not in outcomes.ENDED]
        if left:
            board = Board(before, options.metric)
            _engine(options)(left, directory, options, board, request)
        if request.signal_number is not None:
            raise interrupt.Stopped(request.signal_number, "the trials have saved")
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

    def should_stop() -> bool:
        return request.signal_number is not None

    with board:
        for trial in trials:
            if not should_stop():
                _run_one(trial, options.retries, board, should_stop)


def _run_one(trial: Trial, retries: int, board: Board, should_stop: Callable[[], bool]) -> None:
    for attempt in range(retries + 1):
        board.started(trial)
        try:
            for _ in process.train(trial, should_stop):
                board.refresh()
            break
        except process.TrialFailed as failure:
            if failure.is_final or attempt == retries:
                break
            board.will_be_repeated(trial)
    board.ended(trial)
