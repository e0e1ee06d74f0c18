"""The terminal: what cannot be shown is dropped, and the work goes on.

The other end of a pipe may close, as after `| head -1`; a terminal may go away; a stream may be
closed from the start, or not know a letter. None of these may end hours of training.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Stream(io.TextIOBase):
    """A text stream that drops what its own stream cannot write.

    After the first failure nothing more is written.
    """

    def __init__(self, stream: Any):
        """Takes the stream; None, as Python has for one that was closed, writes nothing."""
        self._stream = stream
        if stream is not None and getattr(stream, "errors", None) == "strict":
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes, or drops the text."""
        with self._dropping():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or drops what is left."""
        with self._dropping():
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person reads it."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def writable(self) -> bool:
        """True: it takes anything."""
        return True

    def fileno(self) -> int:
        """The file descriptor, for the width of the terminal."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        """What else libraries ask for, such as `buffer`."""
        return getattr(self.__dict__["_stream"], name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream, by which tqdm decides on its letters."""
        return getattr(self._stream, "encoding", None) or "ascii"

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except UnicodeError:  # of a stream that cannot be reconfigured
            pass
        except (OSError, ValueError):
            # The stream's buffer still holds the text, and Python would try again at its exit.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            self._stream = None


def stderr() -> Stream:
    """Standard error, as it is now."""
    return sys.stderr if isinstance(sys.stderr, Stream) else Stream(sys.stderr)


def say(line: str) -> None:
    """Writes a line to standard error."""
    print(line, file=stderr(), flush=True)


def duration(seconds: float) -> str:
    """Formats as 0:42, 12:05 or 3:04:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def protect() -> None:
    """Makes all writes of this process to standard output and error drop what they cannot write."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
    if not isinstance(sys.stdout, Stream):
        sys.stdout = Stream(sys.stdout)
    if not isinstance(sys.stderr, Stream):
        sys.stderr = Stream(sys.stderr)
