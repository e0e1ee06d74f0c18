"""Why low-rank means trail unconstrained ones: what they can express, and how they are trained.

    python -m experiments.results.rank --config=cifar10 --workdir=runs/rank

trains `mvn`, and `lowrank` of every rank with ν at three speeds: that of μ, a tenth of it, and a
thousandth of it ("fixed": nearly the same for all images; the default). --config.FIELD=VALUE sets a
field for all. Then the means of each `mvn` are replaced by their best approximations of rank 1, 2,
…, and nothing is trained again. All figures are ELBOs on a tenth of the training split, which no
run was trained on.

The workdir receives rank.json and rank.md. The same command continues what was stopped.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
from absl import flags
from jaxtyping import Array, Float

from experiments import options, study
from svae_jax import latents
from svae_jax.analysis import tables, trained
from svae_jax.evaluation import bounds
from svae_jax.model import SpatialVAE
from svae_jax.training import job as jobs
from svae_jax.training import loop

# Speed of ν relative to that of μ. At a thousandth it hardly moves in any run.
SPEEDS = {"as fast as mu": 1.0, "a tenth of that": 0.1, "fixed": 1e-3}


class Truncated(SpatialVAE):
    """Of each map's unconstrained mean it keeps the best approximation of a rank."""

    rank: int = 1

    def encode(self, images: Float[Array, "b h w c"], train: bool = False) -> latents.Params:
        """The posteriors of images, with means of low rank."""
        params = super().encode(images, train)
        return params | {"mean": truncate(params["mean"], self.rank)}


def truncate(mean: Float[Array, "*b h w n"], rank: int) -> Float[Array, "*b h w n"]:
    """The nearest maps of this rank, by the singular value decomposition (Eckart and Young)."""
    u, s, v = jnp.linalg.svd(jnp.moveaxis(mean, -1, -3), full_matrices=False)
    nearest = jnp.matmul(u[..., :rank] * s[..., None, :rank], v[..., :rank, :], precision="highest")
    return jnp.moveaxis(nearest, -3, -1)


def _define(values: flags.FlagValues) -> None:
    options.define_path("workdir", "directory of all runs", values)
    flags.DEFINE_integer("seeds", 3, "runs of each model", 1, flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, evaluates, and writes the tables.

    Raises:
        UserError: a mistake in the options, or in the configuration.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the run has saved.
    """
    values, file = study.begin(argv, __doc__, _define)
    split, latent = values.config.dataset.split, values.config.latent
    ranks = range(1, min(latent.height, latent.width) + 1)
    held_out = {"dataset.split": f"{split}[:90%]", "dataset.eval_split": f"{split}[90%:]"}
    records: list[dict[str, Any]] = []
    for seed in range(values.seeds):
        fields = {**options.overrides(values), **held_out, "seed": seed}
        config, directory = options.load(f"{file}:mvn", fields), values.workdir / f"mvn_seed={seed}"
        elbo = loop.train(config, directory)["metrics"]["eval/elbo"]
        records.append({"model": "mvn", "seed": seed, "elbo": elbo})
        for rank in ranks:
            run = {"model": "truncated mvn", "rank": rank, "seed": seed}
            records.append(run | {"elbo": _truncated_elbo(config, directory, rank)})
        for rank, (speed, nu_scale) in itertools.product(ranks, SPEEDS.items()):
            changed = fields | {"latent.nu_scale": nu_scale}
            config = options.load(f"{file}:lowrank,rank={rank}", changed)
            directory = values.workdir / f"rank={rank}_nu={nu_scale:g}_seed={seed}"
            result = loop.train(config, directory)
            run = {"model": "lowrank", "rank": rank, "nu": speed, "seed": seed}
            records.append(run | {"elbo": result["metrics"]["eval/elbo"]})
        settings = study.settings("results.rank", argv, config, result) | {
            "seeds": seed + 1,
            "learning_rate": config.optimizer.learning_rate,
            "schedule": config.optimizer.schedule,
        }
        study.write(values.workdir / "rank", {"settings": settings, "runs": records}, render)


def _truncated_elbo(config: ml_collections.ConfigDict, directory: Path, rank: int) -> float:
    """The held-out ELBO of a trained `mvn` with means of a rank."""
    job = jobs.prepare(config, directory)
    parts = ("posterior", "encoder", "decoder", "prior", "likelihood")
    model = Truncated(**{name: getattr(job.recipe.model, name) for name in parts}, rank=rank)
    recipe, variables = job.recipe._replace(model=model), trained.load(directory).variables
    return bounds.held_out(recipe, variables, job.train_images, job.eval_images, job.mesh)["elbo"]


def render(content: Mapping[str, Any]) -> str:
    """The whole of `rank.md`, from the content of `rank.json`."""
    records, settings = content["runs"], content["settings"]
    ranks = sorted({record["rank"] for record in records if "rank" in record})

    def elbo(**wanted: Any) -> str:
        values = [r["elbo"] for r in records if wanted.items() <= r.items()]
        sd = statistics.stdev(values) if len(values) > 1 else None
        return tables.figure({"value": statistics.mean(values), "standard_error": sd})

    def row(means: str, **wanted: Any) -> dict[str, str]:
        return {"means": means} | {f"rank {rank}": elbo(rank=rank, **wanted) for rank in ranks}

    rows = [
        {"means": "unconstrained (`mvn`)"}
        | {f"rank {rank}": elbo(model="mvn") if rank == ranks[-1] else "" for rank in ranks},
        row("the best approximations of these, nothing trained again", model="truncated mvn"),
        *(row(f"trained, nu {speed}", model="lowrank", nu=speed) for speed in SPEEDS),
    ]
    return (
        f"# Low-rank means\n\n{tables.markdown(rows)}\n\n"
        f"ELBO in nats on `{settings['split']}` of `{settings['dataset']}`, mean ± standard "
        f"deviation over {settings['seeds']} seeds; {settings['num_steps']:,} training steps of "
        f"{settings['batch_size']} images, learning rate {settings['learning_rate']:g} "
        f"({settings['schedule']}); {settings['device']}.\n\nMade by `{settings['command']}`.\n"
    )


if __name__ == "__main__":
    options.run_command(main)
