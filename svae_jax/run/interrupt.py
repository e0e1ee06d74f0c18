"""SIGTERM and Ctrl-C: the run finishes its step, saves and stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and has saved.

    Attributes:
        exit_code: 128 plus the signal's number, as in a shell: 143 or 130. It is never 0, so that
            a script does not take the run for a finished one.
    """

    def __init__(self, signal_number: int, step: int):
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}: saved at step {step}; the same command continues")
        self.exit_code = 128 + signal_number


class Request:
    """The signal that asked the run to stop, or None."""

    signal_number: int | None = None


@contextlib.contextmanager
def listening(*, enabled: bool = True) -> Iterator[Request]:
    """Notes the first SIGTERM or Ctrl-C for the loop; a second one ends the process at once.

    Outside the main thread Python allows no signal handlers, so nothing is noted there.

    Args:
        enabled: False leaves the signal handlers unchanged.
    """
    request = Request()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, _: object) -> None:
        request.signal_number = number
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
