"""SIGTERM, Ctrl-C and a closed terminal: the run finishes its step, saves and stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_HANG_UP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # of a terminal
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_HANG_UP)


class Stopped(Exception):
    """The command was asked to stop, and has saved.

    Attributes:
        exit_code: 128 plus the signal's number, as in a shell: 143, 130 or 129. It is never 0, so
            that a script does not take the run for a finished one.
    """

    def __init__(self, signal_number: int, saved: str):
        """Takes the signal, and what is saved, such as "saved at step 5"."""
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}: {saved}; the same command continues")
        self.exit_code = 128 + signal_number


class Request:
    """What has asked the run to stop.

    Attributes:
        signal_number: the signal that this process has got, or None.
    """

    signal_number: int | None = None

    def __init__(self) -> None:
        self._checks = 0

    def agreed(self) -> int | None:
        """The signal for which to stop now, or None.

        A signal to one of several processes stops all of them at the same call, a call or two
        later. So each of them must make the same calls.
        """
        # Imported late, so that --help answers at once.
        import jax

        from svae_jax.devices import processes

        number = self.signal_number  # read once: a signal may arrive between two lines
        if jax.process_count() == 1:
            return number
        self._checks += 1
        if number is not None:
            processes.ask_to_stop(number)
        return processes.asked_to_stop(self._checks)


@contextlib.contextmanager
def listening() -> Iterator[Request]:
    """Notes the first signal for the loop; a second SIGTERM or Ctrl-C ends the process at once.

    A second SIGHUP does not: a terminal that closes sends two, itself and through its shell. One
    that is ignored, as after `nohup`, stays so. Outside the main thread Python allows no signal
    handlers, so nothing is noted there.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _HANG_UP:
        if before[number] == signal.SIG_IGN:
            del before[number]

    def note(number: int, _: object) -> None:
        request.signal_number = number
        for other in before:
            signal.signal(other, signal.SIG_IGN if other in _HANG_UP else signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            # Python cannot give back a handler that C has set, which JAX's for SIGTERM is.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
