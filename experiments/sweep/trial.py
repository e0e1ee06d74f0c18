"""A trial: one run of a sweep, and what has become of it, read from its workdir.

The run's `result.json` is the truth. Beside it a sweep writes one file, `trial.json`, into the
workdir of a trial that failed or that early stopping has pruned; deleting it forgets the mark.
Ray's workers import this module, so it imports neither JAX nor Flax.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from svae_jax import files
from svae_jax.run import workdir as workdirs

POSTERIOR = "posterior"  # the override that stands for the text after the configuration's colon
SEED = "seed"

DONE, PRUNED, FAILED, UNFINISHED, PENDING = "done", "pruned", "failed", "unfinished", "pending"
ENDED = (DONE, PRUNED)  # what a rerun does not start again

_MARK = "trial.json"
_LOWER_IS_BETTER = ("bits_per_dim", "error", "mse", "loss", "sigma", "kl")

Overrides = Mapping[str, Any]


class Criterion(NamedTuple):
    """A number of `metrics.jsonl` by which trials are compared, and its direction."""

    name: str
    mode: str  # max or min

    @classmethod
    def of(cls, name: str, mode: str | None = None) -> "Criterion":
        """With the direction that the name suggests, unless one is given."""
        lower = any(word in name for word in _LOWER_IS_BETTER)
        return cls(name, mode or ("min" if lower else "max"))

    @property
    def sign(self) -> int:
        """By which values are multiplied so that higher is better."""
        return 1 if self.mode == "max" else -1


ELBO = Criterion("eval/elbo", "max")


@dataclasses.dataclass(frozen=True)
class Options:
    """How trials are run. All but `metric` and `retries` are for Ray.

    Attributes:
        engine: ray, or local.
        metric: shown, and by which trials are pruned.
        retries: how often a trial that fails is started again; never after a user's mistake.
        address: of a running Ray cluster; None starts one on this machine.
        cpus: of a trial; None: an equal share of a machine with GPUs, else the whole machine.
        gpus: of a trial, a fraction or a whole number; None: one, where there are any.
        early_stopping: prunes by ASHA, after so many steps for the first time.
    """

    engine: str = "ray"
    metric: Criterion = ELBO
    retries: int = 2
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    early_stopping: int | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: the overrides and a hash of what decides the trial's numbers.
        overrides: what the sweep sets; dotted fields, and `posterior`.
        arguments: those of `svae_jax.main`, without the workdir.
        workdir: where it runs.
    """

    name: str
    overrides: Overrides
    arguments: tuple[str, ...]
    workdir: Path

    def command(self, python: str = "python") -> list[str]:
        """The ordinary command line."""
        return [python, "-m", "svae_jax.main", *self.arguments, f"--workdir={self.workdir}"]

    def parameters(self) -> dict[str, Any]:
        """The overrides, with a posterior's options apart: posterior=lowrank, rank=2."""
        found = dict(self.overrides)
        if POSTERIOR in found:
            name, *options = str(found.pop(POSTERIOR)).split(",")
            pairs = (option.strip().partition("=") for option in options)
            numbers = {key: int(x) if x.isdecimal() else x for key, _, x in pairs}
            found = {POSTERIOR: name, **numbers, **found}
        return found

    def evaluations(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Step and metrics of each evaluation so far; NaN where they are not finite."""
        for row in workdirs.read_metrics(self.workdir):
            metrics = {name: x for name, x in row.items() if name.startswith("eval/")}
            if metrics:
                yield row["step"], _finite(metrics)

    def outcome(self) -> "Outcome":
        """What has become of it so far.

        Raises:
            UserError: a file in its workdir is damaged.
        """
        if (result := files.read_json(self.workdir / "result.json")) is not None:
            metrics, speed = _finite(result["metrics"]), result["images_per_second"]
            size = sum(result["parameters"].values())
            return Outcome(self, DONE, result["step"], metrics, speed, size)
        step, metrics = [(None, {}), *self.evaluations()][-1]
        if (mark := files.read_json(self.workdir / _MARK)) is not None:
            return Outcome(self, mark["status"], step, metrics, reason=mark["reason"])
        begun = workdirs.has_begun(self.workdir)
        return Outcome(self, UNFINISHED if begun else PENDING, step, metrics)

    def mark(self, status: str, reason: str) -> None:
        """Notes in its workdir that it failed, or was pruned."""
        workdirs.create(self.workdir)
        files.write_json(self.workdir / _MARK, {"status": status, "reason": reason})

    def is_pruned(self) -> bool:
        """Whether early stopping has pruned it."""
        return (files.read_json(self.workdir / _MARK) or {}).get("status") == PRUNED

    def forget_mark(self) -> None:
        """Removes the note."""
        (self.workdir / _MARK).unlink(missing_ok=True)


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
    step: int | None
    metrics: dict[str, float]
    images_per_second: float | None = None
    num_parameters: int | None = None
    reason: str = ""

    def value(self, metric: Criterion) -> float:
        """The metric; NaN where there is none yet."""
        return self.metrics.get(metric.name, math.nan)


def best_of(found: Iterable[Outcome], metric: Criterion) -> Outcome | None:
    """The best of the trials that are done; None if none has the metric."""
    rated = [o for o in found if o.status == DONE and not math.isnan(o.value(metric))]
    return max(rated, key=lambda outcome: metric.sign * outcome.value(metric), default=None)


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}
