"""Ray Tune as the engine: it places trials on devices, repeats those that fail, and prunes (ASHA).

Ray's own files are for one call: a sweep that goes on starts with the trials that are left, and
reads nothing that Ray has saved. Where Tune stops a function it kills what the function has
started, which may be saving. So a trial is stopped by a file, for which its function looks, and
Tune sees it end by itself.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from experiments.sweep import trial as trial_lib
from experiments.sweep.board import Board
from experiments.sweep.trial import IsStopped, Options, Trial
from svae_jax import files
from svae_jax.errors import UserError

_PATIENCE = 30  # seconds for a cluster to answer
_STARTS = 3  # attempts to start Ray, which gives up after 30 s, too soon for a busy machine
_WORST = -1e30  # in place of a metric that is not finite: ASHA's percentiles must be finite
_STEP, _VALUE = "step", "value"  # what a trial reports; a higher value is better

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints, however quiet it is asked to be
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may end without an evaluation
}
_OF_LIBRARIES = ("JAX_", "XLA_", "LIBTPU_", "TF_", "TFDS_")  # settings that a node may not have


def run(
    trials: Sequence[Trial], directory: Path, options: Options, board: Board, is_stopped: IsStopped
) -> None:
    """Runs trials, as many at a time as there are resources for.

    Raises:
        UserError: no Ray answers at the address, or no node has the resources of a trial.
    """
    storage = (directory / "ray").absolute()
    # Absolute, since another node may have another working directory.
    trials = [dataclasses.replace(trial, workdir=trial.workdir.absolute()) for trial in trials]
    with _cluster(options.address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = resources(nodes, options.cpus, options.gpus)
        shutil.rmtree(storage / "sweep", ignore_errors=True)
        storage.mkdir(exist_ok=True)
        watch = _Watch(trials, board, is_stopped, storage / "stop")
        watch.stop_file.unlink(missing_ok=True)
        settings = {k: v for k, v in os.environ.items() if k.startswith(_OF_LIBRARIES)}
        settings |= trial_lib.limits(cpus, gpus)
        train = functools.partial(trial_lib.train, environment=settings, directory=os.getcwd())
        trainable = tune.with_parameters(
            _train, trials=trials, metric=options.metric, stop_file=watch.stop_file, train=train
        )
        scheduler = _Pruning(trials, options.early_stopping)
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            param_space={"index": tune.grid_search(list(range(len(trials))))},
            # A new actor for each trial would take seconds to start.
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep",  # the folder
                storage_path=str(storage),
                verbose=0,
                callbacks=[watch],
                stop=watch,
                failure_config=tune.FailureConfig(max_failures=options.retries),
            ),
        ).fit()


def resources(
    nodes: Sequence[dict[str, float]], cpus: int | None, gpus: float | None
) -> tuple[int, float]:
    """CPU cores and GPUs of a trial: by default a GPU and its share, or a whole machine.

    Raises:
        UserError: no node has as many.
    """
    most_gpus = max(node.get("GPU", 0) for node in nodes)
    gpus = min(1, most_gpus) if gpus is None else gpus
    if gpus > most_gpus:
        raise UserError(f"--gpus={gpus:g}: no node has more than {most_gpus:g}")
    able = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
    if cpus is None:
        shares = [node["CPU"] * gpus / node["GPU"] if gpus else node["CPU"] for node in able]
        cpus = max(1, math.floor(min(shares, default=1)))
    if cpus > (most_cpus := int(max((node["CPU"] for node in able), default=0))):
        raise UserError(f"--cpus={cpus}: no node with {gpus:g} GPUs has more than {most_cpus}")
    return cpus, gpus


def _train(
    config: dict[str, Any], trials: Sequence[Trial], metric: str, stop_file: Path, train: Any
) -> None:
    """Watches over a trial's process, and reports each evaluation to Tune."""
    trial, reported = trials[config["index"]], -1

    def is_stopped() -> bool:
        return stop_file.exists() or trial.is_pruned()

    tune.report({_STEP: 0})  # Tune prints a line about a trial that ends without any report
    try:
        for _ in itertools.chain(train(trial, is_stopped), [None]):  # once more when it has ended
            for step, metrics in trial.evaluations():
                if step > reported and metric in metrics:
                    value = trial_lib.sign(metric) * metrics[metric]
                    tune.report({_STEP: step, _VALUE: value if math.isfinite(value) else _WORST})
                    reported = step
    except trial_lib.TrialFailed as failure:
        if not failure.is_final:
            raise


class _Pruning(ASHAScheduler):
    """ASHA, which marks the trials that are to stop instead of stopping them."""

    def __init__(self, trials: Sequence[Trial], first_step: int | None):
        """Takes the trials, and the steps after which it first prunes; None: it never does."""
        self._trials, never = trials, 10**12
        super().__init__(
            time_attr=_STEP,
            metric=_VALUE,
            mode="max",
            grace_period=first_step or never,
            max_t=never,
            reduction_factor=3,
            stop_last_trials=False,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ours = self._trials[trial.config["index"]]
        is_to_stop = super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP
        if is_to_stop and not ours.is_pruned():  # it may report further until it has saved
            ours.mark(trial_lib.PRUNED, f"by early stopping, at step {result[_STEP]}")
        return TrialScheduler.CONTINUE


@dataclasses.dataclass(eq=False)
class _Watch(tune.Callback, tune.Stopper):
    """Shows what Tune does. After a signal it asks all trials to stop, and starts no others."""

    trials: Sequence[Trial]
    board: Board
    is_stopped: IsStopped
    stop_file: Path

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, but a terminal cannot be, and nobody reads it."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if not self.stop_file.exists():  # else it ends at once
            self.board.begin(self._ours(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.board.end(self._ours(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        ours = self._ours(trial)
        if ours.outcome().status not in (trial_lib.DONE, trial_lib.FAILED):
            ours.mark(trial_lib.FAILED, "its Ray worker died")
        self.board.end(ours)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.board.repeat(self._ours(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self.is_stopped() and not self.stop_file.exists():
            self.stop_file.touch()
            self.board.print("stopping: the trials save")

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # no trial alone

    def stop_all(self) -> bool:
        """Whether the trials that ran when the signal came have saved."""
        return self.stop_file.exists() and not self.board.running

    def _ours(self, trial: Any) -> Trial:
        return self.trials[trial.config["index"]]


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Ray, on this machine or at an address, for the duration of the block.

    Raises:
        UserError: it does not start, or does not answer at the address.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the board tells what fails
    handler = signal.getsignal(signal.SIGTERM)
    failed, cure = "Ray does not start", "--engine=local does without it"
    if address:
        failed = f"--address={address}: no Ray answers"
        cure = "ray start --head starts one; where it has a token, set RAY_AUTH_MODE=token"
    try:
        _start(address)
    except Exception as error:
        raise UserError(f"{failed} ({files.reason(error)}); {cure}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own, which ends the process
    try:
        yield
    finally:
        ray.shutdown()


def _start(address: str | None) -> None:
    """Connects to Ray; any exception may come from it."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        host, colon, port = address.rpartition(":")
        if colon:  # where nothing listens, `ray.init` would try for minutes
            socket.create_connection((host, int(port)), _PATIENCE).close()
        ray.init(address, **quiet)
        return
    for left in reversed(range(_STARTS)):
        try:
            # Nothing large passes through the object store; by default it takes 30% of the memory.
            ray.init("local", include_dashboard=False, object_store_memory=10**8, **quiet)
            return
        except Exception:
            ray.shutdown()
            if not left:
                raise
