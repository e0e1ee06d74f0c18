"""A trial's process: the ordinary command line, which saves when it is asked to stop."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from experiments.sweep.trial import FAILED, Trial
from svae_jax import files
from svae_jax.run import workdir as workdirs

_PAUSE = 0.5  # seconds between two looks
_LOG = "log.txt"  # in the workdir: what the process writes to stderr

# Becomes the command in sys.argv[2:], and receives SIGTERM (15) when its parent process dies, so
# that it saves and stops. Not `preexec_fn`, which may deadlock in a process that has threads.
_TETHERED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class TrialFailed(Exception):
    """A trial's process ended with an error.

    Attributes:
        is_final: it would fail again, since it is the user's mistake.
    """

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.is_final = exit_code == 2


def limits(cpus: int | None, gpus: float | None) -> dict[str, str]:
    """Environment variables that keep a trial to its share of a machine."""
    found: dict[str, str] = {}
    if cpus:
        # The first is that of XLA, whose threads are otherwise as many as the cores.
        found |= dict.fromkeys(("NPROC", "OMP_NUM_THREADS"), str(cpus))
    if gpus and gpus < 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        # Otherwise the first process on a GPU takes three quarters of its memory.
        found["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    return found


def train(
    trial: Trial,
    should_stop: Callable[[], bool],
    environment: Mapping[str, str] = {},
    directory: str | Path | None = None,
) -> Iterator[None]:
    """Runs a trial's command; yields about twice a second until it has ended.

    A trial that another process runs is waited for. One that has finished returns at once.

    Args:
        trial: the trial.
        should_stop: whether to send SIGTERM, upon which the process saves.
        environment: variables added to those of this process.
        directory: the process's working directory; this one's by default.

    Raises:
        TrialFailed: the process ended with an error, which is also noted in the workdir.
    """
    if should_stop():
        return
    workdirs.create(trial.workdir)
    while not (should_stop() or _is_free(trial.workdir)):
        yield
        time.sleep(_PAUSE)
    if should_stop():
        return
    trial.forget_mark()
    with (trial.workdir / _LOG).open("ab") as log:
        begin = log.tell()  # before the process moves it
        process = _start(trial, environment, directory, log)
    is_asked = False
    try:
        while process.poll() is None:
            yield
            if should_stop() and not is_asked:
                process.terminate()  # once: a second signal ends it without saving
                is_asked = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PAUSE)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode and not is_asked:
        reason = _reason(trial.workdir / _LOG, begin, process.returncode)
        trial.mark(FAILED, reason)
        raise TrialFailed(reason, process.returncode)


def _start(
    trial: Trial, environment: Mapping[str, str], directory: str | Path | None, log: IO[bytes]
) -> subprocess.Popen:
    tether = [sys.executable, "-I", "-S", "-c", _TETHERED, str(os.getpid())]
    return subprocess.Popen(
        [*(tether if sys.platform == "linux" else []), *trial.command(sys.executable)],
        cwd=directory,
        # Unfiltered, so that the error is the last line.
        env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # result.json
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches the sweep, which sends SIGTERM
    )


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
