"""What a run is about: configuration, data and mesh, validated before anything compiles."""

import functools
from pathlib import Path
from typing import NamedTuple

import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from svae_jax import config as configs
from svae_jax import data
from svae_jax.devices import processes, sharding
from svae_jax.model import SpatialVAE
from svae_jax.recipe import Recipe
from svae_jax.run import workdir

Pixels = UInt8[np.ndarray, "n h w c"]


class Job(NamedTuple):
    """Everything a run needs that stays fixed: configuration, data, mesh."""

    config: ml_collections.ConfigDict
    directory: Path
    mesh: Mesh
    recipe: Recipe
    train_images: Pixels
    eval_images: Pixels
    num_steps: int


def prepare(config: ml_collections.ConfigDict, directory: Path, model: SpatialVAE | None) -> Job:
    """Validates the configuration, the workdir and the data, before anything compiles.

    Raises:
        UserError: a mistake that the user can correct.
    """
    mesh = sharding.make_mesh()
    configs.check(config, num_devices=mesh.size)
    workdir.create(directory)
    earlier = workdir.read_json(directory / "config.json") if workdir.has_begun(directory) else None
    if earlier is not None:
        configs.check_continues(config, configs.from_dict(earlier))
    dataset = config.dataset
    fields = ("name", "image_size", "channels", "data_dir", "cache_dir")
    load = functools.partial(data.load, **{field: dataset[field] for field in fields})
    train_images, eval_images = load(split=dataset.split), load(split=dataset.eval_split)
    num_steps = configs.num_steps(config, len(train_images))
    if earlier is not None:
        configs.check_duration(config, configs.from_dict(earlier), len(train_images))
    recipe = configs.recipe(config, num_steps, model)
    return Job(config, directory, mesh, recipe, train_images, eval_images, num_steps)


def check_same(job: Job) -> None:
    """Checks that all processes of a run are given the same.

    Raises:
        UserError: they are not; they would train on different things, or wait for ever.
    """
    fields = configs.flatten(job.config.to_dict())
    here = ("dataset.data_dir", "dataset.cache_dir")  # each machine may have its own
    processes.check_same(
        {
            "options": {name: value for name, value in fields.items() if name not in here},
            "images": [len(job.train_images), len(job.eval_images)],
            "--workdir": workdir.saved(job.directory),
        }
    )
