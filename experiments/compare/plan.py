"""What a comparison trains: the models, the objectives, the learning rates and the seeds."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from svae_jax.errors import UserError

Overrides = dict[str, Any]

_MODELS = (
    "vector",
    "naive",
    "mvn",
    "lowrank",
    "lowrank,rank=2",
    "lowrank,rank=3",
    "mvn_full",
    "lowrank_full",
    "best_vector",
    "best",
)


# What these models are under the released code's scaling, which takes one Gaussian σ and the prior
# N(0, I) alone.
_RELEASED = {"best": "plain", "best_vector": "plain_vector"}


class Setting(NamedTuple):
    """How much a comparison does.

    Attributes:
        models: what stands behind the colon of a configuration.
        scalings: values of `objective.scaling`.
        learning_rates: tried for each model on a part of the training split; a single one is that
            of all models, and without any each has that of its configuration.
        search_steps: updates of each run of that search; 0: as many as of the other runs.
        seeds: the runs of each model are those of seed 0 to `seeds` - 1.
        num_steps: updates of each run; 0: as the configuration says.
        samplers: fitted to every run.
        flow_steps: updates of the sampler `flow`; 0: its default.
        importance_samples: K of the importance-weighted bound.
        num_samples: images drawn from each sampler.
    """

    models: tuple[str, ...] = _MODELS
    scalings: tuple[str, ...] = ("elbo", "released_code")
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    search_steps: int = 0
    seeds: int = 3
    num_steps: int = 0
    samplers: tuple[str, ...] = ("gaussian", "mixture", "flow")
    flow_steps: int = 0
    importance_samples: int = 100
    num_samples: int = 10_000

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(model, scaling) of all runs, each once, scaling by scaling.

        With "released_code", `plain` and `plain_vector` stand for `best` and `best_vector`.
        """
        pairs = (
            (_RELEASED.get(model, model) if scaling == "released_code" else model, scaling)
            for scaling in self.scalings
            for model in self.models
        )
        return tuple(dict.fromkeys(pairs))


FULL = Setting()
# Minutes on two cores: what the whole does, on less of everything.
QUICK = Setting(
    models=("vector", "lowrank", "best"),
    scalings=("elbo",),
    learning_rates=(),
    seeds=2,
    num_steps=200,
    samplers=("gaussian",),  # the mixture and the flow take longer than the training
    importance_samples=5,
    num_samples=500,
)


class PlannedRun(NamedTuple):
    """One training run: the model and what is changed in its configuration."""

    model: str
    scaling: str
    seed: int
    learning_rate: float

    @property
    def overrides(self) -> Overrides:
        """The changed fields of the configuration."""
        return {
            "objective.scaling": self.scaling,
            "optimizer.learning_rate": self.learning_rate,
            "seed": self.seed,
        }


class Search(NamedTuple):
    """What the search of the learning rate found.

    Attributes:
        elbos: nats, of every run; None where it failed.
        split: the images that they are of.
    """

    elbos: Mapping[PlannedRun, float | None]
    split: str

    def to_json(self) -> list[dict[str, Any]]:
        """A record of each run."""
        return [
            {"model": r.model, "scaling": r.scaling, "learning_rate": r.learning_rate, "elbo": elbo}
            for r, elbo in self.elbos.items()
        ]


def search_runs(setting: Setting) -> list[PlannedRun]:
    """The runs of the search of the learning rate, all with seed 0."""
    return [
        PlannedRun(model, scaling, 0, rate)
        for model, scaling in setting.pairs
        for rate in setting.learning_rates
    ]


def search_split(split: str) -> dict[str, str]:
    """Overrides that train on nine tenths of a training split and evaluate on the last one.

    Raises:
        UserError: the split is a part of one already.
    """
    if not re.fullmatch(r"\w+", split):
        raise UserError(
            f"dataset.split={split!r} must be a whole split, such as 'train': the comparison holds "
            "a tenth of it back to choose the learning rates"
        )
    return {"dataset.split": f"{split}[:90%]", "dataset.eval_split": f"{split}[90%:]"}


def best_rates(elbos: Mapping[PlannedRun, float | None]) -> dict[tuple[str, str], float]:
    """(model, scaling) -> the learning rate with the highest held-out ELBO.

    Args:
        elbos: of every run of the search, in nats; None where the run failed.

    Raises:
        UserError: all runs of a model failed.
    """
    done = {run: elbo for run, elbo in elbos.items() if elbo is not None}
    ranked = sorted(done, key=lambda run: done[run])  # of each model, the last one wins
    best = {(run.model, run.scaling): run.learning_rate for run in ranked}
    for run in elbos:
        if (run.model, run.scaling) not in best:
            message = f"all runs of {run.model} ({run.scaling}) failed; see their last lines above"
            raise UserError(message)
    return best


def final_runs(setting: Setting, rates: Mapping[tuple[str, str], float]) -> Iterable[PlannedRun]:
    """The runs that the tables are of, seed by seed, so that each seed gives a whole table.

    Args:
        setting: the models, scalings and seeds.
        rates: (model, scaling) -> learning rate.
    """
    for seed in range(setting.seeds):
        for model, scaling in setting.pairs:
            yield PlannedRun(model, scaling, seed, rates[model, scaling])
