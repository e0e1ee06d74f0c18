"""Why low-rank means trail free ones: what they can express, and how they are trained.

    python -m experiments.rank --config=configs/cifar10.py --workdir=runs/rank

trains `mvn`, and `lowrank` of every rank with ν at three speeds: that of μ, a tenth of it, and
fixed (the same for all images). All runs have the same number of updates and learning rate, and
--config.FIELD=VALUE sets a field for all. Then the means of each `mvn` are replaced by their best
approximations of rank 1, 2, …, and nothing is trained again. All figures are ELBOs on a tenth of
the training split, which no run was trained on.

The workdir receives rank.json and rank.md. The same command continues what was stopped.
"""

import dataclasses
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from experiments.compare import plan, summary
from experiments.compare.tables import mean_and_sd
from experiments.options import Parser, nonempty_path, run_command
from svae_jax import command_line, latents
from svae_jax import config as configs
from svae_jax.analysis import tables, trained
from svae_jax.data import cache
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds
from svae_jax.files import os_errors_for_user
from svae_jax.model import SpatialVAE
from svae_jax.run import workdir as workdirs
from svae_jax.training import job as jobs
from svae_jax.training import loop

# Speed of ν relative to that of μ. At a thousandth it hardly moves in any run.
SPEEDS = {"as fast as mu": 1.0, "a tenth of that": 0.1, "fixed": 1e-3}


class Truncated(SpatialVAE):
    """A model with free means that keeps of each map's mean its best approximation of a rank."""

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


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, evaluates, and writes the tables.

    Raises:
        UserError: a mistake in the options, or in the configuration.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the run has saved.
    """
    parser = Parser("rank", __doc__)
    parser.add_argument("--config", required=True, help="configuration: configs/cifar10.py")
    parser.add_argument(
        "--workdir", type=nonempty_path, required=True, help="directory of all runs"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    options, common = parser.parse_known_args(argv)
    if options.seeds < 1:
        raise UserError(f"--seeds={options.seeds} must be at least 1")
    runtime.keep_freed_memory()
    runtime.keep_compiled_programs(cache.home() / "compiled")
    file = options.config.partition(":")[0]
    records: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        config = _config(file, "mvn", seed, common)
        directory = options.workdir / f"mvn_seed={seed}"
        result = loop.train(config, directory)
        free = {"model": "mvn", "seed": seed, "elbo": result["metrics"]["eval/elbo"]}
        records += [free, *_truncated(config, directory, seed)]
        for rank, speed in itertools.product(_ranks(config), SPEEDS):
            config = _config(file, f"lowrank,rank={rank}", seed, common)
            directory = options.workdir / f"rank={rank}_nu={SPEEDS[speed]:g}_seed={seed}"
            result = loop.train(config, directory, _with_speed(config, SPEEDS[speed]))
            elbo = result["metrics"]["eval/elbo"]
            records.append(
                {"model": "lowrank", "rank": rank, "nu": speed, "seed": seed, "elbo": elbo}
            )
        _write(options.workdir, config, result, records, argv)


def render(content: Mapping[str, Any]) -> str:
    """The whole of `rank.md`, from the content of `rank.json`."""
    records, settings = content["runs"], content["settings"]

    def cell(**wanted: Any) -> str:
        those = [{"elbo": r["elbo"]} for r in records if wanted.items() <= r.items()]
        return mean_and_sd(summary.over_seeds(those)["elbo"])

    ranks = sorted({record["rank"] for record in records if "rank" in record})
    rows = [
        {"means": "free (`mvn`)"} | {f"rank {rank}": "" for rank in ranks},
        {"means": "the best approximations of these, nothing trained again"}
        | {f"rank {rank}": cell(model="truncated mvn", rank=rank) for rank in ranks},
    ]
    rows[0][f"rank {ranks[-1]}"] = cell(model="mvn")
    rows += [
        {"means": f"trained, nu {speed}"}
        | {f"rank {rank}": cell(model="lowrank", rank=rank, nu=speed) for rank in ranks}
        for speed in SPEEDS
    ]
    return (
        f"# Low-rank means\n\n{tables.markdown(rows)}\n\n"
        f"ELBO in nats on `{settings['split']}` of `{settings['dataset']}`, mean ± standard "
        f"deviation over {settings['seeds']} seeds; {settings['num_steps']:,} updates of "
        f"{settings['batch_size']} images, learning rate {settings['learning_rate']:g} "
        f"({settings['schedule']}); {settings['device']}.\n\nMade by `{settings['command']}`.\n"
    )


def _config(
    file: str, posterior: str, seed: int, common: Sequence[str]
) -> ml_collections.ConfigDict:
    """The configuration of a run, which leaves a tenth of the training split for evaluation."""
    config, _ = command_line.load_config(f"{file}:{posterior}", common)
    config.dataset.update(
        {k.partition(".")[2]: v for k, v in plan.search_split(config.dataset.split).items()}
    )
    config.seed = seed
    return config


def _ranks(config: ml_collections.ConfigDict) -> range:
    return range(1, min(config.latent.height, config.latent.width) + 1)


def _with_speed(config: ml_collections.ConfigDict, speed: float) -> SpatialVAE:
    """The configuration's model, whose ν moves at this speed."""
    model = configs.model(config)
    means = dataclasses.replace(model.posterior.mean_model, nu_scale=speed)
    posterior = dataclasses.replace(model.posterior, mean_model=means)
    return model.clone(posterior=posterior, encoder=model.encoder.clone(posterior=posterior))


def _truncated(
    config: ml_collections.ConfigDict, directory: Path, seed: int
) -> list[dict[str, Any]]:
    """The held-out ELBO of a trained `mvn` with means of each rank below the full one."""
    job = jobs.prepare(config, directory, None)
    variables = trained.load(directory).variables
    fields = {
        name: getattr(job.recipe.model, name)
        for name in ("posterior", "encoder", "decoder", "prior", "likelihood")
    }
    records = []
    for rank in _ranks(config):
        recipe = job.recipe._replace(model=Truncated(**fields, rank=rank))
        found = bounds.held_out(recipe, variables, job.train_images, job.eval_images, job.mesh)
        records.append(
            {"model": "truncated mvn", "rank": rank, "seed": seed, "elbo": found["elbo"]}
        )
    return records


def _write(
    workdir: Path,
    config: ml_collections.ConfigDict,
    result: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    argv: Sequence[str],
) -> None:
    settings = {
        "dataset": config.dataset.name,
        "split": config.dataset.eval_split,
        "seeds": len({record["seed"] for record in records}),
        "num_steps": result["step"],
        "batch_size": config.batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "schedule": config.optimizer.schedule,
        "device": summary.device(result["device"]),
        "versions": result["versions"],
        "command": shlex.join(["python", "-m", "experiments.rank", *argv]),
    }
    content = {"settings": settings, "runs": list(records)}
    workdirs.write_json(workdir / "rank.json", content)
    with os_errors_for_user(f"{workdir / 'rank.md'} cannot be written"):
        (workdir / "rank.md").write_text(render(content))
    print(f"written: {workdir / 'rank.md'}")


if __name__ == "__main__":
    run_command(main)
