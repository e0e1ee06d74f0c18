"""Progress on the terminal: a bar, or plain lines if stderr is not a terminal."""

import contextlib
import io
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm

from svae_jax import terminal

_SHOWN = ("loss", "kl")  # of a training step; all of an evaluation


class Progress(contextlib.AbstractContextManager):
    """Reports training on stderr; stdout is for results.

    On a terminal it shows a bar, with evaluations as lines above it. Elsewhere each log is a line:

        step 300/1500  loss 1234.5  kl 56.7  1,234 images/s  ETA 0:42
        step 300  eval: elbo 1069.1  bits/dim 4.321

    **Images per second** are the images between two logs over the time between them, without the
    time inside `paused()`. Call `start` when the first step is done, so that its compilation does
    not count; without that call the clock starts at the first log, which then has no rate. The ETA
    uses the mean speed since the clock started, pauses included, so it allows for the evaluations
    to come. Steps from before a resume do not enter it.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        *,
        step: int = 0,
        enabled: bool = True,
        stream: io.TextIOBase | None = None,
    ):
        """Shows the bar, on a terminal.

        Args:
          num_steps: training steps of the whole run.
          batch_size: images a step, over all devices and processes.
          step: the first step; above 0 on resume.
          enabled: False prints nothing and still measures: of many processes, one reports.
          stream: where to write; stderr by default.
        """
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._stream = terminal.stderr() if stream is None else terminal.Stream(stream)
        self._enabled = enabled
        self._begin: tuple[int, float] | None = None  # step and time at which the clock started
        self._mark = (step, 0.0)  # and of the last log
        self._paused_s = 0.0  # since then
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps,
                initial=step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def start(self, step: int) -> None:
        """Starts the clock: `step` is done on the device, and everything is compiled."""
        self._begin = self._mark = (step, time.monotonic())
        self._paused_s = 0.0

    def advance(self, step: int) -> None:
        """Moves the bar to `step`, if there is a bar; cheap enough to call at every step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes evaluation and saving from the images per second."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - begin

    def train(self, step: int, values: Mapping[str, Any]) -> float | None:
        """Reports a log of training.

        Args:
          step: steps done.
          values: scalars by name, with or without a prefix such as `train/`; loss and kl are
            shown. They are fetched before the clock is read, so the device has finished `step`.

        Returns:
          Images per second since the last log, or None if nothing has been measured yet.
        """
        shown = {_label(name): float(value) for name, value in values.items()}
        measured = self._measure(step)
        parts = [f"{name} {_number(shown[name])}" for name in _SHOWN if name in shown]
        if measured:
            parts += [f"{measured[0]:,.0f} images/s", f"ETA {terminal.duration(measured[1])}"]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts), refresh=False)
            self.advance(step)
            self._bar.refresh()
        else:
            self.print("  ".join([f"step {step}/{self._num_steps}", *parts]))
        return measured and measured[0]

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Reports all held-out metrics; names may have a prefix such as `eval/`."""
        parts = [f"{_label(name)} {_number(value)}" for name, value in values.items()]
        self.print(f"step {step}  eval: " + "  ".join(parts))

    def print(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._enabled:
            print(line, file=self._stream, flush=True)

    def __exit__(self, *_: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _measure(self, step: int) -> tuple[float, float] | None:
        """Returns images per second since the last log and seconds left; None if unmeasured."""
        if self._begin is None:
            self.start(step)
            return None
        now = time.monotonic()
        (first, began), (last, logged) = self._begin, self._mark
        running = now - logged - self._paused_s
        self._mark, self._paused_s = (step, now), 0.0
        if step == last or running <= 0:
            return None
        seconds_per_step = (now - began) / (step - first)
        return (step - last) * self._batch_size / running, (
            self._num_steps - step
        ) * seconds_per_step


def _label(name: str) -> str:
    return name.rpartition("/")[2].replace("bits_per_dim", "bits/dim")


def _number(value: Any) -> str:
    """Formats with about four digits: 1234.5, 56.7, 4.321, 0.0123."""
    number = float(value)
    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    if abs(number) >= 10:
        return f"{number:.1f}"
    return f"{number:.3f}" if abs(number) >= 0.1 else f"{number:.3g}"
