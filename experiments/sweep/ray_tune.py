"""Ray Tune as the engine: it places trials on devices, repeats those that fail, and prunes (ASHA).

Ray's own files are for one call: a sweep that goes on starts with the trials that are left, and
reads nothing that Ray has saved. Tune gives an actor that is to stop ten seconds at the end of an
experiment, which may be too short to save. So a trial is stopped by a file, for which its actor
looks, and Tune sees it end by itself.
"""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from experiments.sweep import outcomes, process
from experiments.sweep.board import Board
from experiments.sweep.engines import Options
from experiments.sweep.outcomes import Metric
from experiments.sweep.trials import Trial
from svae_jax.errors import UserError
from svae_jax.run import interrupt

_PATIENCE = 30  # seconds for a cluster to answer
_WORST = -1e30  # in place of a metric that is not finite: ASHA's percentiles must be finite
_NO_LIMIT = 10**12  # steps
_STEP, _VALUE = "step", "value"  # what a trial reports; a higher value is better

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial reports twice a second, and most of these reports hold no evaluation.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


class Resources(NamedTuple):
    """What a trial takes of a node."""

    cpus: int
    gpus: float


def run(
    trials: Sequence[Trial],
    directory: Path,
    options: Options,
    board: Board,
    request: interrupt.Request,
) -> None:
    """Runs trials, as many at a time as there are resources for.

    Raises:
        UserError: no Ray answers at the address, or no node has the resources of a trial.
    """
    storage = (directory / "ray").absolute()
    trials = [_absolute(trial) for trial in trials]
    with _cluster(options.address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needed = resources(nodes, options.cpus, options.gpus)
        shutil.rmtree(storage, ignore_errors=True)
        storage.mkdir()
        stop_file = storage / "stop"
        watch = _Watch(trials, board, request, stop_file)
        trainable = tune.with_parameters(
            _Train,
            trials=trials,
            metric=options.metric,
            stop_file=stop_file,
            environment=process.limits(needed.cpus, needed.gpus),
            directory=os.getcwd(),
        )
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": needed.cpus, "gpu": needed.gpus}),
            param_space={"index": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(scheduler=_scheduler(trials, options)),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                verbose=0,
                callbacks=[watch],
                stop=_Stopper(watch),
                failure_config=tune.FailureConfig(max_failures=options.retries),
            ),
        ).fit()


def resources(
    nodes: Sequence[dict[str, float]], cpus: int | None, gpus: float | None
) -> Resources:
    """A trial's share of a node: by default a GPU and its share of the cores, or a whole machine.

    Args:
        nodes: the resources of each node, by Ray's names.
        cpus: of a trial, if given.
        gpus: of a trial, if given.

    Raises:
        UserError: no node has as many.
    """
    most_gpus = max(node.get("GPU", 0) for node in nodes)
    gpus = min(1, most_gpus) if gpus is None else gpus
    if gpus > most_gpus:
        raise UserError(f"--gpus={gpus:g}: no node has more than {most_gpus:g}")
    able = [node for node in nodes if node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= 1]
    most_cpus = int(max((node["CPU"] for node in able), default=0))
    if cpus is None:
        shares = [node["CPU"] * gpus / node["GPU"] if gpus else node["CPU"] for node in able]
        cpus = max(1, math.floor(min(shares, default=1)))
    if cpus > most_cpus:
        raise UserError(f"--cpus={cpus}: no node with {gpus:g} GPUs has more than {most_cpus}")
    return Resources(cpus, gpus)


class _Train(tune.Trainable):
    """A trial: an actor that watches over the trial's process."""

    def setup(
        self,
        config: dict[str, Any],
        *,
        trials: Sequence[Trial],
        metric: Metric,
        stop_file: Path,
        environment: dict[str, str],
        directory: str,
    ) -> None:
        self._trial = trials[config["index"]]
        self._metric = metric
        self._reported = -1  # the step of the last evaluation that Tune knows

        def should_stop() -> bool:
            return stop_file.exists() or outcomes.is_pruned(self._trial)

        self._training = process.train(self._trial, should_stop, environment, directory)

    def step(self) -> dict[str, Any]:
        """Reports the next evaluation if there is one; else waits for about half a second."""
        for step, metrics in outcomes.evaluations(self._trial.workdir):
            if step > self._reported and self._metric.name in metrics:
                self._reported = step
                value = self._metric.sign * metrics[self._metric.name]
                return {_STEP: step, _VALUE: value if math.isfinite(value) else _WORST}
        try:
            next(self._training)
        except StopIteration:
            return {"done": True}
        except process.TrialFailed as failure:
            if failure.is_final:
                return {"done": True}
            raise
        return {}

    def cleanup(self) -> None:
        self._training.close()


class _Pruning(ASHAScheduler):
    """ASHA, which marks the trials that are to stop instead of stopping them."""

    def __init__(self, trials: Sequence[Trial], grace: int):
        super().__init__(
            time_attr=_STEP,
            metric=_VALUE,
            mode="max",
            grace_period=grace,
            max_t=_NO_LIMIT,
            reduction_factor=3,
            stop_last_trials=False,
        )
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            ours = self._trials[trial.config["index"]]
            reason = f"by early stopping, at step {result[_STEP]}"
            outcomes.mark(ours, outcomes.PRUNED, reason)
        return TrialScheduler.CONTINUE


def _scheduler(trials: Sequence[Trial], options: Options) -> TrialScheduler:
    if options.early_stopping is None:
        return FIFOScheduler()
    return _Pruning(trials, options.early_stopping)


class _Watch(tune.Callback):
    """Shows what Tune does, and asks all trials to stop after a signal."""

    def __init__(
        self, trials: Sequence[Trial], board: Board, request: interrupt.Request, stop_file: Path
    ):
        self._trials = trials
        self._board = board
        self._request = request
        self._stop_file = stop_file
        self._awaited: set[str] | None = None  # the trials that ran when the signal came
        self.is_over = False

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._board.started(self._ours(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._board.ended(self._ours(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        ours = self._ours(trial)
        if outcomes.read(ours).status not in (outcomes.DONE, outcomes.FAILED):
            outcomes.mark(ours, outcomes.FAILED, "its Ray worker died")
        self._board.ended(ours)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._board.refresh()
        if self._request.signal_number is None:
            return
        running = {trial.trial_id for trial in trials if trial.status == "RUNNING"}
        if self._awaited is None:
            self._stop_file.touch()
            self._awaited = running
            self._board.print("stopping: the trials save")
        self.is_over = self._awaited.isdisjoint(running)

    def _ours(self, trial: Any) -> Trial:
        return self._trials[trial.config["index"]]


class _Stopper(tune.Stopper):
    """Ends the experiment once the trials that ran have saved."""

    def __init__(self, watch: _Watch):
        self._watch = watch

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._watch.is_over


def _absolute(trial: Trial) -> Trial:
    """Another node may have another working directory."""
    return trial.__class__(trial.name, trial.overrides, trial.arguments, trial.workdir.absolute())


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Ray, on this machine or at an address, for the duration of the block."""
    os.environ.update(_ENVIRONMENT)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Nothing large passes through the object store; by default it takes 30% of the memory.
        ray.init(include_dashboard=False, object_store_memory=10**8, **quiet)
    else:
        _check_answers(address)
        ray.init(address=address, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Connects in a process of its own: `ray.init` would try for minutes.

    Raises:
        UserError: no Ray of this version answers in time.
    """
    code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"--address={address}: no Ray answers within {_PATIENCE} s; ray start --head starts one"
        ) from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        raise UserError(f"--address={address}: {' '.join(reason)}")
