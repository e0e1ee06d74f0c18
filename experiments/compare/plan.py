"""What a comparison trains: the models, the objectives, the learning rates and the seeds."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from svae_jax.errors import UserError

Rates = dict[tuple[str, str], float]  # (model, scaling) -> learning rate

_MODELS = (
    "vector", "naive", "mvn", "lowrank", "lowrank,rank=2", "lowrank,rank=3", "mvn_full",
    "lowrank_full", "best_vector", "best",
)  # fmt: skip
# What these models are under the released code's scaling, which takes one Gaussian σ and the prior
# N(0, I) alone.
_RELEASED = {"best": "plain", "best_vector": "plain_vector"}


class Setting(NamedTuple):
    """How much a comparison does."""

    models: tuple[str, ...] = _MODELS  # what stands behind the colon of a configuration
    scalings: tuple[str, ...] = ("elbo", "released_code")  # values of `objective.scaling`
    # Tried for each model on a part of the training split; a single one is that of all models, and
    # without any each has that of its configuration.
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    search_steps: int = 0  # training steps of each run of that search; 0: of all runs
    seeds: int = 3  # the runs of each model are those of seed 0 to `seeds` - 1
    num_steps: int = 0  # training steps of each run; 0: as the configuration says
    samplers: tuple[str, ...] = ("gaussian", "mixture", "flow")  # fitted to every run
    flow_steps: int = 0  # training steps of the sampler `flow`; 0: its default
    importance_samples: int = 100  # K of the importance-weighted bound
    num_samples: int = 10_000  # images drawn from each sampler

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
    def overrides(self) -> dict[str, Any]:
        """The changed fields of the configuration."""
        return {
            "objective.scaling": self.scaling,
            "optimizer.learning_rate": self.learning_rate,
            "seed": self.seed,
        }


Elbos = Mapping[PlannedRun, float | None]  # held-out, in nats; None where the run failed


def search_runs(setting: Setting) -> list[PlannedRun]:
    """The runs of the search of the learning rate, all with seed 0."""
    return [PlannedRun(*pair, 0, rate) for pair in setting.pairs for rate in setting.learning_rates]


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


def best_rates(elbos: Elbos) -> Rates:
    """The learning rates with the highest held-out ELBO, from every run of the search.

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


def final_runs(setting: Setting, rates: Rates) -> list[PlannedRun]:
    """The runs that the tables are of, seed by seed, so that each seed gives a whole table."""
    return [
        PlannedRun(*pair, seed, rates[pair])
        for seed in range(setting.seeds)
        for pair in setting.pairs
    ]
