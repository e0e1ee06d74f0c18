"""Several processes that train one model: they join, stop and end together.

All messages go through the key-value store of JAX's coordination service, which process 0 runs.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from svae_jax import terminal
from svae_jax.errors import UserError

# What JAX's own handler of SIGTERM sets: XLA's preemption_sync_manager.cc.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
_SIGNAL, _END, _READ, _BEATS = (f"svae_jax/{name}/" for name in ("signal", "end", "read", "beats"))

_TICK = 0.5  # seconds between two looks at the store
_PATIENCE = 5.0  # seconds of silence after which a failed exchange means a death
_LAST_WORDS = 5.0  # seconds that process 0 serves the others after the end
_LEFT = "left"

# The line and the exit code with which an exception ends a command; None for a bug.
Ending = Callable[[BaseException], tuple[str, int] | None]


@contextlib.contextmanager
def joined(
    address: str | None, heartbeat_timeout: int, ending: Ending, agreed: type[BaseException]
) -> Iterator[None]:
    """Joins the processes of a run; an exception in one of them ends them all.

    They end within seconds, with the line and the exit code of the first exception. A process that
    is killed ends the others after `heartbeat_timeout`, or once an exchange of arrays fails.

    Args:
        address: None: this process is alone, and nothing changes. "auto": on a cluster that JAX
            detects. Else HOST:PORT,NUM_PROCESSES,PROCESS_ID, with a free port of process 0.
        heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
        ending: how an exception ends the command.
        agreed: an exception that all processes raise at the same step; it passes.

    Raises:
        UserError: the address is not valid.
    """
    if address is None:
        yield
        return
    # JAX's own detection aborts all processes with a stack trace; its timeout is longer, so that
    # ours acts first. It may count from a heartbeat that is half of its timeout older than the
    # death.
    _initialize(address, 2 * heartbeat_timeout + 20)
    # It also aborts once process 0 is gone, where absl would print the stacks of all threads.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    with _Watch(heartbeat_timeout) as watch:
        try:
            yield
        except agreed:
            raise
        except BaseException as error:
            watch.end(*(ending(error) or watch.explain(error)))


def _initialize(address: str, heartbeat_timeout: int) -> None:
    arguments: dict[str, Any] = {}
    if address != "auto":
        try:
            coordinator, num_processes, process_id = address.split(",")
            arguments = {"num_processes": int(num_processes), "process_id": int(process_id)}
        except ValueError:
            raise UserError(
                f"--distributed={address} must be 'auto' or HOST:PORT,NUM_PROCESSES,PROCESS_ID"
            ) from None
        arguments["coordinator_address"] = coordinator
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=heartbeat_timeout)
    except ValueError as error:
        raise UserError(f"--distributed={address}: {error}") from None


def ask_to_stop(signal_number: int) -> None:
    """Asks all processes to stop together, because of this signal."""
    _set_first(f"{_SIGNAL}number", str(int(signal_number)))
    _set_first(_NOTICE, "1970-01-01T00:00:00+00:00")  # of a preemption that is due


def asked_to_stop(check: int) -> int | None:
    """The signal for which to stop now, at the same check of all processes, or None.

    It waits for no other process until one is asked to stop. A SIGTERM that only JAX has noticed
    counts too.

    Args:
        check: counts the calls of this function, from 1.
    """
    if not multihost_utils.reached_preemption_sync_point(check):
        return None
    return int(_read(_SIGNAL).get("number", signal.SIGTERM))


def check_same(facts: Mapping[str, Any]) -> None:
    """Checks that the processes begin alike.

    Args:
        facts: JSON values by name.

    Raises:
        UserError: the values of a name differ.
    """
    if jax.process_count() == 1:
        return
    mine = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in facts.values()]
    of_all = multihost_utils.process_allgather(np.array(mine, np.uint32))
    different = [name for name, column in zip(facts, of_all.T, strict=True) if np.ptp(column)]
    if different:
        raise UserError(
            f"the processes of this run differ in: {', '.join(different)}; give all of them the "
            "same options, the same images, and one --workdir that they share"
        )


class _Watch:
    """Ends this process as the first of all processes ends.

    Within the context a thread gives signs of life and looks for the end of others. That of process
    0 also looks for processes that have ceased to give signs.
    """

    def __init__(self, heartbeat_timeout: int):
        self._timeout = float(heartbeat_timeout)
        self._me = str(_service().process_id)
        self._name = f"process {self._me} on {socket.gethostname()}"
        self._ending = threading.Lock()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="processes", daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(_BEATS + self._me, _LEFT, True)

    def _run(self) -> None:
        pulse, beat, heard = _Pulse(), 0, time.monotonic()
        while not self._leaving.wait(_TICK):
            beat += 1
            try:
                _client().key_value_set(_BEATS + self._me, f"{beat} {self._name}", True)
                if _read(_END):
                    self.end("", 1)  # as is written there
                if self._me == "0" and (dead := pulse.dead(self._timeout)):
                    self.end(_died(dead), 1)
                heard = time.monotonic()
            except jax.errors.JaxRuntimeError:
                if time.monotonic() - heard > _PATIENCE:
                    self.end(_died("process 0"), 1)

    def end(self, line: str, code: int) -> NoReturn:
        """Ends all processes with this line and code, or with what another has written before."""
        self._ending.acquire()  # never released: only one thread ends the process
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is dead
            _set_first(f"{_END}first", json.dumps([line, code]))
            line, code = json.loads(_read(_END)["first"])
            _client().key_value_set(_READ + self._me, "", True)
            until = time.monotonic() + _LAST_WORDS
            while self._me == "0" and time.monotonic() < until:
                if len(_read(_READ)) == _service().num_processes:
                    break
                time.sleep(0.05)
        below_the_bar = "\n" if terminal.stderr().isatty() else ""
        terminal.say(f"{below_the_bar}{line}")
        terminal.Stream(sys.stdout).flush()
        os._exit(code)  # at a usual exit JAX waits for the other processes

    def explain(self, error: BaseException) -> tuple[str, int]:
        """The line and code for an exception that is a bug, or comes of another process's death."""
        if isinstance(error, jax.errors.JaxRuntimeError):
            pulse, until = _Pulse(), time.monotonic() + _PATIENCE + 2 * _TICK
            try:
                while time.monotonic() < until:
                    if dead := pulse.dead(_PATIENCE):
                        return _died(dead), 1
                    time.sleep(_TICK)
            except jax.errors.JaxRuntimeError:
                return _died("process 0"), 1
        traceback.print_exception(error)
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 500, placeholder="…")
        return f"error: {self._name} failed: {reason}", 1


class _Pulse:
    """When each process last gave a new sign of life, by the clock of this process."""

    def __init__(self) -> None:
        now, count = time.monotonic(), _service().num_processes
        self._last = {str(i): ("", now) for i in range(count)}

    def dead(self, patience: float) -> str | None:
        """The name of a process that has given no sign for so many seconds, or None."""
        beats, now = _read(_BEATS), time.monotonic()
        for process, (last, since) in self._last.items():
            beat = beats.get(process, "")
            if beat != last:
                self._last[process] = (beat, now)
            elif beat != _LEFT and now - since > patience:
                return beat.partition(" ")[2] or f"process {process}"
        return None


def _died(process: str) -> str:
    return f"error: {process} has died; the same command goes on from the last checkpoint"


def _service() -> Any:
    """JAX's coordination service: its client, and which process this is of how many.

    JAX 0.10.2, with which this was tested, has no public name for it.
    """
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    return _service().client


def _set_first(key: str, value: str) -> None:
    """Sets a value that only the first process can set."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(key, value)


def _read(folder: str) -> dict[str, str]:
    """The values in a folder of the store, which ends in a slash, by name."""
    return {key.removeprefix(folder): value for key, value in _client().key_value_dir_get(folder)}
