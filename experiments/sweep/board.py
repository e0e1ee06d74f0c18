"""The state of a sweep on the terminal: a live table, or plain lines if stderr is no terminal."""

import collections
import contextlib
import io
import math
import time
from collections.abc import Sequence
from typing import Any

from experiments.sweep import outcomes
from experiments.sweep.outcomes import Metric, Outcome
from experiments.sweep.trial import Trial
from svae_jax import terminal

_REDRAWN_EVERY = 1.0  # seconds
_MOST_ROWS = 20


class Board(contextlib.AbstractContextManager):
    """Shows which trials run, how many are done, the best so far, and an ETA.

    The ETA is the time since the start, times the trials left over those that ended since.
    """

    def __init__(
        self, before: Sequence[Outcome], metric: Metric, stream: io.TextIOBase | None = None
    ):
        """Takes the outcomes of all trials so far, and where to write; stderr by default."""
        self._outcomes = {outcome.trial.name: outcome for outcome in before}
        self._metric = metric
        self._stream: Any = stream or terminal.stderr()
        self._running: dict[str, Trial] = {}
        self._left_at_start = sum(o.status not in outcomes.ENDED for o in before)
        self._ended = 0  # since the start
        self._begin = self._drawn = time.monotonic()
        self._live: Any = None
        if self._stream.isatty():
            from rich.console import Console  # which Flax needs and brings
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)

    def __enter__(self) -> "Board":
        """Begins."""
        if self._live:
            self._live.start()
        self.print(self.summary())
        return self

    def __exit__(self, *_: Any) -> None:
        """Leaves the table as it last was."""
        if self._live:
            self._draw()
            self._live.stop()

    def started(self, trial: Trial) -> None:
        """Shows a trial as running."""
        self._running[trial.name] = trial
        self._tell(f"{trial.name} started")

    def will_be_repeated(self, trial: Trial) -> None:
        """Shows that a trial failed and will be started again."""
        self._running.pop(trial.name, None)
        self.print(f"{trial.name} failed, is tried again: {outcomes.read(trial).reason}")

    def ended(self, trial: Trial) -> None:
        """Shows what has become of a trial."""
        self._running.pop(trial.name, None)
        outcome = self._outcomes[trial.name] = outcomes.read(trial)
        self._ended += outcome.status in (*outcomes.ENDED, outcomes.FAILED)
        told = outcome.reason or f"{self._metric.name} {_number(outcome.value(self._metric))}"
        self.print(f"{trial.name} {outcome.status}: {told}")
        self._tell(self.summary())

    def refresh(self) -> None:
        """Draws the table again if it is old; cheap enough to call often."""
        if self._live and time.monotonic() - self._drawn >= _REDRAWN_EVERY:
            self._draw()

    def print(self, line: str) -> None:
        """Prints a line, above the table if there is one."""
        if self._live:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def summary(self) -> str:
        """One line: how many trials are done, running, failed; the best; the ETA."""
        counts = collections.Counter(o.status for o in self._outcomes.values())
        parts = [f"{counts[outcomes.DONE]}/{len(self._outcomes)} done"]
        if self._running:
            parts.append(f"{len(self._running)} running")
        parts += [f"{counts[s]} {s}" for s in (outcomes.FAILED, outcomes.PRUNED) if counts[s]]
        if (best := best_of(list(self._outcomes.values()), self._metric)) is not None:
            value = _number(best.value(self._metric))
            parts.append(f"best {self._metric.name} {value} ({best.trial.name})")
        if self._ended:
            left = self._left_at_start - self._ended
            eta = (time.monotonic() - self._begin) * left / self._ended
            parts.append(f"ETA {_duration(eta)}")
        return ", ".join(parts)

    def _tell(self, line: str) -> None:
        """Prints a line where there is no table to show the same."""
        if self._live:
            self._draw()
        else:
            self.print(line)

    def _draw(self) -> None:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        self._drawn = time.monotonic()
        table = Table(box=box.SIMPLE)
        table.add_column("running")
        table.add_column("step", justify="right")
        table.add_column(self._metric.name, justify="right")
        for name, trial in list(self._running.items())[:_MOST_ROWS]:
            step, metrics = outcomes.newest_evaluation(trial.workdir) or ("", {})
            table.add_row(name, str(step), _number(metrics.get(self._metric.name, math.nan)))
        if (more := len(self._running) - _MOST_ROWS) > 0:
            table.add_row(f"and {more} more", "", "")
        self._live.update(Group(Text(self.summary()), table), refresh=True)


def best_of(found: Sequence[Outcome], metric: Metric) -> Outcome | None:
    """The best of the trials that are done; None if none has the metric."""
    rated = [o for o in found if o.status == outcomes.DONE and not math.isnan(o.value(metric))]
    return max(rated, key=lambda outcome: metric.sign * outcome.value(metric), default=None)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    """Formats as 12:05 or 3:04:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
