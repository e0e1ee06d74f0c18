"""The state of a sweep on the terminal: lines, and a live table below them on a terminal."""

import collections
import io
import math
import time
from collections.abc import Sequence

from rich.console import Console, Group  # which Flax needs and brings
from rich.live import Live
from rich.table import Table

from experiments.sweep import trial as trials
from experiments.sweep.trial import Outcome, Trial
from svae_jax import terminal

_MOST_ROWS = 20


class Board(Live):
    """Shows which trials run, how many are done, the best so far, and an ETA.

    The ETA is the time since the start, times the trials left over those that ended since.

    Attributes:
        running: the trials that run, by their names.
    """

    def __init__(self, before: Sequence[Outcome], metric: str, stream: io.TextIOBase | None = None):
        """Takes the outcomes of all trials so far, and where to write; stderr by default."""
        console = Console(file=stream or terminal.stderr(), highlight=False, markup=False)  # type: ignore[arg-type]
        self.running: dict[str, Trial] = {}
        self._outcomes, self._metric = {outcome.trial.name: outcome for outcome in before}, metric
        self._left = sum(outcome.status not in trials.ENDED for outcome in before)
        self._ended, self._began = 0, time.monotonic()
        super().__init__(
            console=console,
            transient=not console.is_terminal,  # without one the lines say it all
            refresh_per_second=1,
            get_renderable=self._table,
        )

    def begin(self, trial: Trial) -> None:
        """Shows a trial as running."""
        self.running[trial.name] = trial
        self.print(f"{trial.name} started")

    def repeat(self, trial: Trial) -> None:
        """Shows that a trial failed and will be started again."""
        self.running.pop(trial.name, None)
        self.print(f"{trial.name} failed, is tried again: {trial.outcome().reason}")

    def end(self, trial: Trial) -> None:
        """Shows what has become of a trial that was running."""
        if self.running.pop(trial.name, None) is None:
            return
        outcome = self._outcomes[trial.name] = trial.outcome()
        self._ended += outcome.status in (*trials.ENDED, trials.FAILED)
        value = f"{self._metric} {_number(outcome.value(self._metric))}"
        self.print(f"{trial.name} {outcome.status}: {outcome.reason or value}")
        if not self.console.is_terminal:
            self.print(self._summary())

    def print(self, line: str) -> None:
        """Prints a line, above the table if there is one."""
        self.console.print(line, soft_wrap=True)

    def _summary(self) -> str:
        """One line: how many trials are done, running, failed; the best; the ETA."""
        found = self._outcomes.values()
        counts = collections.Counter(outcome.status for outcome in found)
        line = f"{counts[trials.DONE]}/{len(found)} done"
        counts["running"] = len(self.running)
        for status in ("running", trials.FAILED, trials.PRUNED):
            line += f", {counts[status]} {status}" if counts[status] else ""
        if (best := trials.best_of(found, self._metric)) is not None:
            value = _number(best.value(self._metric))
            line += f", best {self._metric} {value} ({best.trial.name})"
        if self._ended:
            seconds = (time.monotonic() - self._began) / self._ended
            line += f", ETA {terminal.duration(seconds * (self._left - self._ended))}"
        return line

    def _table(self) -> Group:
        table = Table("running", "step", self._metric, box=None)
        for trial in list(self.running.values())[:_MOST_ROWS]:
            outcome = trial.outcome()
            step = "" if outcome.step is None else str(outcome.step)
            table.add_row(trial.name, step, _number(outcome.value(self._metric)))
        return Group(self._summary(), table) if self.running else Group(self._summary())


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
