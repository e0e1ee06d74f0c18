"""A trial: the ordinary command in a process of its own, and what has become of it.

The run's `result.json` is the truth. Beside it stand `log.txt`, with what the process writes to
stderr, and `trial.json` where the trial failed or early stopping has pruned it; deleting that
forgets the mark. Ray's workers import this module, so it imports neither JAX nor Flax.
"""

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from svae_jax import files
from svae_jax.run import workdir as workdirs

POSTERIOR = "posterior"  # the override that stands for the text after the configuration's colon
SEED = "seed"
ELBO = "eval/elbo"  # of metrics.jsonl; by it trials are compared, unless another is named

DONE, PRUNED, FAILED, UNFINISHED, PENDING = "done", "pruned", "failed", "unfinished", "pending"
ENDED = (DONE, PRUNED)  # what a rerun does not start again

_MARK = "trial.json"
_PAUSE = 0.5  # seconds between two looks
_LOWER_IS_BETTER = ("bits_per_dim", "error", "mse", "loss", "sigma", "kl")

# Becomes the command in sys.argv[2:], and receives SIGTERM (15) when its parent process dies, so
# that it saves and stops. Not `preexec_fn`, which may deadlock in a process that has threads.
_TETHERED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

Overrides = Mapping[str, Any]
IsStopped = Callable[[], bool]  # whether a signal has come, or the trial is pruned


def sign(metric: str) -> int:
    """By which the values of a metric are multiplied so that higher is better."""
    return -1 if any(word in metric for word in _LOWER_IS_BETTER) else 1


@dataclasses.dataclass(frozen=True)
class Options:
    """How trials are run. All but `metric` and `retries` are for Ray."""

    engine: str = "ray"  # or local
    metric: str = ELBO  # shown, and by which trials are pruned
    retries: int = 2  # of a trial that fails; never after a user's mistake
    address: str | None = None  # of a running Ray cluster; None starts one on this machine
    cpus: int | None = None  # None: an equal share of a machine with GPUs, else the whole machine
    gpus: float | None = None  # a fraction or a whole number; None: one, where there are any
    early_stopping: int | None = None  # prunes by ASHA, after so many steps for the first time


class Outcome(NamedTuple):
    """A trial's state."""

    trial: "Trial"
    status: str
    step: int | None  # of the metrics; None before the first evaluation
    metrics: dict[str, float]  # the final ones if it is done, else the newest; NaN: not finite
    images_per_second: float | None = None  # of training; None unless done
    num_parameters: int | None = None  # of encoder and decoder; None unless done
    reason: str = ""  # why it failed or was pruned

    def value(self, metric: str) -> float:
        """The metric; NaN where there is none yet."""
        return self.metrics.get(metric, math.nan)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str  # the overrides, and a hash of what decides the trial's numbers
    overrides: Overrides  # what the sweep sets: dotted fields, and `posterior`
    arguments: tuple[str, ...]  # those of `svae_jax.main`, without the workdir
    workdir: Path

    def command(self, python: str = "python") -> list[str]:
        """The ordinary command line."""
        return [python, "-m", "svae_jax.main", *self.arguments, f"--workdir={self.workdir}"]

    def parameters(self) -> dict[str, Any]:
        """The overrides, with a posterior's options apart: posterior=lowrank, rank=2."""
        found = dict(self.overrides)
        if POSTERIOR in found:
            name, *options = str(found.pop(POSTERIOR)).split(",")
            pairs = (option.strip().partition("=") for option in options)
            numbers = {key: int(x) if x.isdecimal() else x for key, _, x in pairs}
            found = {POSTERIOR: name, **numbers, **found}
        return found

    def evaluations(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Step and metrics of each evaluation so far; NaN where they are not finite."""
        for row in workdirs.read_metrics(self.workdir):
            if metrics := {name: x for name, x in row.items() if name.startswith("eval/")}:
                yield row["step"], _finite(metrics)

    def outcome(self) -> Outcome:
        """What has become of it so far.

        Raises:
            UserError: a file in its workdir is damaged.
        """
        if (result := files.read_json(self.workdir / "result.json")) is not None:
            metrics, speed = _finite(result["metrics"]), result["images_per_second"]
            size = sum(result["parameters"].values())
            return Outcome(self, DONE, result["step"], metrics, speed, size)
        step, metrics = [(None, {}), *self.evaluations()][-1]
        if (mark := files.read_json(self.workdir / _MARK)) is not None:
            return Outcome(self, mark["status"], step, metrics, reason=mark["reason"])
        begun = workdirs.has_begun(self.workdir)
        return Outcome(self, UNFINISHED if begun else PENDING, step, metrics)

    def mark(self, status: str, reason: str) -> None:
        """Notes in its workdir that it failed, or was pruned."""
        workdirs.create(self.workdir)
        files.write_json(self.workdir / _MARK, {"status": status, "reason": reason})

    def is_pruned(self) -> bool:
        """Whether early stopping has pruned it."""
        return (files.read_json(self.workdir / _MARK) or {}).get("status") == PRUNED

    def forget_mark(self) -> None:
        """Removes the note."""
        (self.workdir / _MARK).unlink(missing_ok=True)


def best_of(found: Iterable[Outcome], metric: str) -> Outcome | None:
    """The best of the trials that are done; None if none has the metric."""
    rated = [o for o in found if o.status == DONE and not math.isnan(o.value(metric))]
    return max(rated, key=lambda outcome: sign(metric) * outcome.value(metric), default=None)


class TrialFailed(Exception):
    """A trial's process ended with an error; `is_final`: it would again, by the user's mistake."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.is_final = exit_code == 2


def limits(cpus: int | None, gpus: float | None) -> dict[str, str]:
    """Environment variables that keep a trial to its share of a machine."""
    # NPROC is that of XLA, whose threads are otherwise as many as the cores.
    found = dict.fromkeys(("NPROC", "OMP_NUM_THREADS"), str(cpus)) if cpus else {}
    if gpus and gpus < 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # Otherwise the first process on a GPU takes three quarters of its memory.
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    return found


def train(
    trial: Trial,
    is_stopped: IsStopped,
    environment: Mapping[str, str] = {},
    directory: str | Path | None = None,
) -> Iterator[None]:
    """Runs a trial's command; yields about twice a second until it has ended, or is to stop.

    A trial that another process runs is waited for. One that has finished returns at once.

    Args:
        trial: the trial.
        is_stopped: whether to send SIGTERM, and wait until the process has saved.
        environment: variables added to those of this process.
        directory: the process's working directory; this one's by default.

    Raises:
        TrialFailed: the process ended with an error, which is also noted in the workdir.
    """
    workdirs.create(trial.workdir)
    while not (is_stopped() or _is_free(trial.workdir)):
        yield
        time.sleep(_PAUSE)
    if is_stopped():
        return
    trial.forget_mark()
    path = trial.workdir / "log.txt"
    tether = [sys.executable, "-I", "-S", "-c", _TETHERED, str(os.getpid())]
    with path.open("ab") as log:
        begin = log.tell()  # before the process moves it
        process = subprocess.Popen(
            [*(tether if sys.platform == "linux" else []), *trial.command(sys.executable)],
            cwd=directory,
            # Unfiltered, so that the error is the last line.
            env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # result.json
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the sweep, which sends SIGTERM
        )
    try:
        while process.poll() is None and not is_stopped():
            yield
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PAUSE)
    finally:
        is_asked = process.poll() is None
        if is_asked:
            process.terminate()  # once: a second signal would end it without saving
            process.wait()
    if process.returncode and not is_asked:
        reason = _reason(path, begin, process.returncode)
        trial.mark(FAILED, reason)
        raise TrialFailed(reason, process.returncode)


def _is_free(workdir: Path) -> bool:
    with files.lock(workdir / ".lock", wait=False) as free:
        return free


def _reason(log: Path, begin: int, exit_code: int) -> str:
    """The last line that a process wrote, or the signal that ended it."""
    if exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    lines = log.read_bytes()[begin:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("error: ") or f"exit code {exit_code}"


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}
