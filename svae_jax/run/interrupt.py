"""Signals that ask a run to stop: it may finish its step and save first."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and has saved.

    Attributes:
        exit_code: 128 plus the signal's number, as shells have it: 143 or 130, never 0, lest half a
            run be taken for a whole one.
    """

    def __init__(self, signal_number: int, step: int):
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}: saved at step {step}; the same command goes on there")
        self.exit_code = 128 + signal_number


class Request:
    """Which signal has asked to stop, if any."""

    signal_number: int | None = None


@contextlib.contextmanager
def listening(*, enabled: bool = True) -> Iterator[Request]:
    """Notes the first SIGTERM or Ctrl-C for the loop to see; a second one ends at once.

    Outside the main thread, where Python allows no handlers, nothing is noted.

    Args:
        enabled: False leaves signals to what they do anyway, which is to end the process.
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
