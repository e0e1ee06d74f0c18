"""What has become of a trial, read from its workdir: `result.json` is the truth.

Beside it a sweep writes one file, `trial.json`, into the workdir of a trial that failed or that
early stopping has pruned. Deleting it forgets the mark.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.sweep.trials import Trial
from svae_jax.run import workdir as workdirs

DONE, PRUNED, FAILED, UNFINISHED, PENDING = "done", "pruned", "failed", "unfinished", "pending"
ENDED = (DONE, PRUNED)  # what a rerun does not start again

_MARK = "trial.json"
_LOWER_IS_BETTER = ("bits_per_dim", "error", "mse", "loss", "sigma", "kl")


class Metric(NamedTuple):
    """A number of `metrics.jsonl` by which trials are compared, and its direction."""

    name: str = "eval/elbo"
    mode: str = "max"  # or min

    @classmethod
    def of(cls, name: str, mode: str | None = None) -> "Metric":
        """With the direction that the name suggests, unless one is given."""
        lower = any(word in name for word in _LOWER_IS_BETTER)
        return cls(name, mode or ("min" if lower else "max"))

    @property
    def sign(self) -> int:
        """By which values are multiplied so that higher is better."""
        return 1 if self.mode == "max" else -1


class Outcome(NamedTuple):
    """A trial's state.

    Attributes:
        trial: the trial.
        status: done, pruned, failed, unfinished or pending.
        step: of the metrics; None before the first evaluation.
        metrics: the final ones of a trial that is done, else the newest; NaN where not finite.
        images_per_second: of training; None unless done.
        num_parameters: of encoder and decoder; None unless done.
        reason: why it failed or was pruned.
    """

    trial: Trial
    status: str
    step: int | None = None
    metrics: dict[str, float] = {}
    images_per_second: float | None = None
    num_parameters: int | None = None
    reason: str = ""

    def value(self, metric: Metric) -> float:
        """The metric; NaN where there is none yet."""
        return self.metrics.get(metric.name, math.nan)


def read(trial: Trial) -> Outcome:
    """Reads the outcome of a trial so far.

    Raises:
        UserError: a file in its workdir is damaged.
    """
    if (result := workdirs.read_json(trial.workdir / "result.json")) is not None:
        return Outcome(
            trial,
            DONE,
            result["step"],
            _finite(result["metrics"]),
            result["images_per_second"],
            sum(result["parameters"].values()),
        )
    step, metrics = newest_evaluation(trial.workdir) or (None, {})
    if (mark := workdirs.read_json(trial.workdir / _MARK)) is not None:
        return Outcome(trial, mark["status"], step, metrics, reason=mark["reason"])
    begun = workdirs.has_begun(trial.workdir)
    return Outcome(trial, UNFINISHED if begun else PENDING, step, metrics)


def mark(trial: Trial, status: str, reason: str) -> None:
    """Notes in its workdir that a trial failed, or was pruned."""
    workdirs.create(trial.workdir)
    workdirs.write_json(trial.workdir / _MARK, {"status": status, "reason": reason})


def is_pruned(trial: Trial) -> bool:
    """Whether early stopping has pruned a trial."""
    return (workdirs.read_json(trial.workdir / _MARK) or {}).get("status") == PRUNED


def forget_mark(trial: Trial) -> None:
    """Removes the note."""
    (trial.workdir / _MARK).unlink(missing_ok=True)


def evaluations(workdir: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and metrics of each evaluation in `metrics.jsonl`."""
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        if '"eval/' not in line:
            continue
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # the line that is being written
            continue
        yield row["step"], _finite({k: x for k, x in row.items() if k.startswith("eval/")})


def newest_evaluation(workdir: Path) -> tuple[int, dict[str, float]] | None:
    """The last of `evaluations`."""
    return max(evaluations(workdir), key=lambda row: row[0], default=None)


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}
