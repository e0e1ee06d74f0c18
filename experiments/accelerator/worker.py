"""Runs parts in a process of their own, which is stopped where a part takes too long."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from experiments.accelerator.sizes import Context, Row
from svae_jax import files
from svae_jax.errors import UserError
from svae_jax.run import interrupt

GRACE = 10.0  # seconds in which a stopped part may save and report

_START = 60.0  # seconds in which JAX finds its devices; they do not count for a part

_MEMORY = ("resource_exhausted", "out of memory", "memoryerror")


class Worker(contextlib.AbstractContextManager):
    """A process that runs parts one after another and keeps what it has compiled.

    A part that is too slow gets SIGTERM and, after `GRACE`, SIGKILL, with all processes that it has
    started. The next part then has a new process, as after one that died or ran out of memory.
    """

    def __init__(self, module: str = "experiments.accelerator.parts"):
        """Takes the module whose `PARTS` the process runs."""
        self._module = module
        self._process: Any = None
        self._connection: Connection | None = None

    def start(self) -> str:
        """Starts the process; returns JAX's platform there, such as "gpu".

        Raises:
            UserError: JAX does not start.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._module))
        self._process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            if self._connection.poll(_START):
                return self._connection.recv()
        self._end()
        raise UserError(f"JAX did not start, within {_START:.0f} s, in a process of its own")

    def run(
        self,
        name: str,
        context: Context,
        seconds: float,
        add: Callable[[Row], None],
        request: interrupt.Request,
    ) -> str:
        """Runs a part until its end, its limit or a signal; says how it ended.

        Args:
            name: of the part.
            context: what the part is given.
            seconds: after which it is stopped.
            add: is called with each row at once.
            request: the signals of this process.
        """
        if self._process is None:
            try:
                self.start()
            except UserError as error:
                return f"failed: {error}"
        assert self._connection is not None
        end, why = time.monotonic() + seconds, ""
        try:
            self._connection.send((name, context))
            while True:
                if self._connection.poll(0.2):
                    kind, value = self._connection.recv()
                    if kind == "row":
                        add(value)
                        continue
                    if why or is_about_memory(value):
                        self._end()
                    return f"stopped {why}: {value}" if why else value
                now = time.monotonic()
                if why and now > end:
                    break
                if not why and (request.signal_number or now > end):
                    why = "by a signal" if request.signal_number else "at its limit"
                    os.killpg(self._process.pid, signal.SIGTERM)
                    end = now + GRACE
        except (EOFError, OSError):
            pass
        code = self._end()
        return f"stopped {why}" if why else f"failed: its process ended with exit code {code}"

    def _end(self) -> int | None:
        """Kills the process and all that it has started; its exit code, if it had ended."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(0.1)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have a group of its own yet
        process.join()
        return code

    def __exit__(self, *_: Any) -> None:
        """Kills the process."""
        self._end()


def _serve(connection: Connection, module: str) -> None:
    """Runs the parts that it is sent, and sends their rows and how they ended."""
    os.setsid()  # one signal then reaches all that it starts
    import jax

    parts = importlib.import_module(module).PARTS
    connection.send(jax.default_backend())
    while True:
        try:
            name, context = connection.recv()
        except EOFError:
            return
        try:
            for row in parts[name].measure(context):
                connection.send(("row", row))
            ended = "done"
        except interrupt.Stopped as error:
            ended = str(error).partition(";")[0]
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)
            ended = f"failed: {type(error).__name__}: {files.reason(error)}"
        connection.send(("end", ended))


def halving(measure: Callable[[int], Iterator[Row]], batch: int) -> Iterator[Row]:
    """The rows of `measure(batch)`; out of memory, those of half the batch, and so on."""
    while True:
        try:
            yield from measure(batch)
            return
        except Exception as error:
            if not is_about_memory(f"{type(error).__name__} {error}") or batch < 2:
                raise
        yield {"out of memory at batch": batch, "tried next": batch // 2}
        batch //= 2


def is_about_memory(message: str) -> bool:
    """Whether an error says that memory ran out, of JAX's, PyTorch's or Python's."""
    return any(words in message.lower() for words in _MEMORY)
