"""The state of a sweep on the terminal: a live table, or plain lines if stderr is no terminal."""

import collections
import contextlib
import io
import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group  # which Flax needs and brings
from rich.live import Live
from rich.table import Table

from experiments.sweep import trial as trials
from experiments.sweep.trial import Criterion, Outcome, Trial
from svae_jax import terminal
from svae_jax.terminal import duration

_MOST_ROWS = 20


class Board(contextlib.AbstractContextManager):
    """Shows which trials run, how many are done, the best so far, and an ETA.

    The ETA is the time since the start, times the trials left over those that ended since.

    Attributes:
        running: the trials that run, by their names.
    """

    def __init__(
        self, before: Sequence[Outcome], metric: Criterion, stream: io.TextIOBase | None = None
    ):
        """Takes the outcomes of all trials so far, and where to write; stderr by default."""
        self._outcomes = {outcome.trial.name: outcome for outcome in before}
        self._metric = metric
        self.running: dict[str, Trial] = {}
        self._left = sum(outcome.status not in trials.ENDED for outcome in before)
        self._ended, self._begin = 0, time.monotonic()
        console = Console(file=stream or terminal.stderr(), highlight=False, markup=False)  # type: ignore[arg-type]
        self._live = Live(console=console, refresh_per_second=1, get_renderable=self._table)

    def __enter__(self) -> "Board":
        """Begins."""
        if self._is_live():
            self._live.start()
        self.print(self.summary())
        return self

    def __exit__(self, *_: Any) -> None:
        """Leaves the table as it last was."""
        if self._is_live():
            self._live.stop()

    def started(self, trial: Trial) -> None:
        """Shows a trial as running."""
        self.running[trial.name] = trial
        if not self._is_live():
            self.print(f"{trial.name} started")

    def will_be_repeated(self, trial: Trial) -> None:
        """Shows that a trial failed and will be started again."""
        self.running.pop(trial.name, None)
        self.print(f"{trial.name} failed, is tried again: {trial.outcome().reason}")

    def ended(self, trial: Trial) -> None:
        """Shows what has become of a trial that was running."""
        if self.running.pop(trial.name, None) is None:
            return
        outcome = self._outcomes[trial.name] = trial.outcome()
        self._ended += outcome.status in (*trials.ENDED, trials.FAILED)
        value = f"{self._metric.name} {_number(outcome.value(self._metric))}"
        self.print(f"{trial.name} {outcome.status}: {outcome.reason or value}")
        if not self._is_live():
            self.print(self.summary())

    def print(self, line: str) -> None:
        """Prints a line, above the table if there is one."""
        self._live.console.print(line, soft_wrap=True)

    def summary(self) -> str:
        """One line: how many trials are done, running, failed; the best; the ETA."""
        counts = collections.Counter(o.status for o in self._outcomes.values())
        parts = [f"{counts[trials.DONE]}/{len(self._outcomes)} done"]
        parts += [f"{len(self.running)} running"] if self.running else []
        parts += [f"{counts[s]} {s}" for s in (trials.FAILED, trials.PRUNED) if counts[s]]
        if (best := trials.best_of(self._outcomes.values(), self._metric)) is not None:
            value = _number(best.value(self._metric))
            parts.append(f"best {self._metric.name} {value} ({best.trial.name})")
        if self._ended:
            passed = time.monotonic() - self._begin
            parts.append(f"ETA {duration(passed * (self._left - self._ended) / self._ended)}")
        return ", ".join(parts)

    def _is_live(self) -> bool:
        return self._live.console.is_terminal

    def _table(self) -> Group:
        table = Table("running", "step", self._metric.name, box=None)
        running = list(self.running.items())
        for name, trial in running[:_MOST_ROWS]:
            outcome = trial.outcome()
            step = "" if outcome.step is None else str(outcome.step)
            table.add_row(name, step, _number(outcome.value(self._metric)))
        if len(running) > _MOST_ROWS:
            table.add_row(f"and {len(running) - _MOST_ROWS} more", "", "")
        return Group(self.summary(), table)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
