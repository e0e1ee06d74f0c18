"""What a run is about: configuration, data and mesh, validated before anything compiles."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Num

from svae_jax import config as configs
from svae_jax import data, identity, likelihoods, sizes
from svae_jax.data import images as image_lib
from svae_jax.data import record as records
from svae_jax.data.record import Record
from svae_jax.devices import processes, sharding
from svae_jax.identity import Identity
from svae_jax.model import SpatialVAE
from svae_jax.recipe import Recipe
from svae_jax.run import workdir

Pixels = Num[np.ndarray, "n h w c"]

_MOST_PIXELS = 2**24  # of training images, from which the directions of the channels are found


class Job(NamedTuple):
    """Everything a run needs that stays fixed: configuration, data, mesh."""

    config: ml_collections.ConfigDict
    directory: Path
    mesh: Mesh
    recipe: Recipe
    train_images: Pixels
    eval_images: Pixels
    record: Record
    num_steps: int


def prepare(
    config: ml_collections.ConfigDict,
    directory: Path,
    model: SpatialVAE | None = None,
    images: Any = None,
) -> Job:
    """Validates the configuration, the workdir and the data, before anything compiles.

    Args:
        config: see `config.base`.
        directory: the workdir.
        model: taken instead of the one that `latent` and `model` describe.
        images: arrays taken instead of a data set, see `data.images.from_python`.

    Raises:
        UserError: a mistake that the user can correct.
    """
    arrays = None
    if images is not None:
        arrays = image_lib.from_python(images)
    config = _resolved(config, arrays)
    mesh = sharding.make_mesh()
    configs.check(config, num_devices=mesh.size, own=model)
    has_begun = workdir.has_begun(directory)
    if not has_begun and arrays is None:
        data.check_outside(config.dataset.to_dict(), directory)
    workdir.create(directory)
    workdir.check_own(directory)
    earlier = identity.read(directory) if has_begun else None
    if earlier is not None:
        config = configs.continued(config, earlier.config)
        configs.check_continues(config, earlier.config)
    config = identity.stored(config, earlier)
    dataset = config.dataset
    order = data.MIXED if earlier is None else earlier.order
    splits = (dataset.split, dataset.eval_split)
    train_images, eval_images = (
        data.load_of(dataset.to_dict(), arrays, split, order) for split in splits
    )
    num_steps = configs.num_steps(config, len(train_images))
    if earlier is not None:
        configs.check_duration(config, earlier.config, len(train_images))
    cache_dir = data.cache_directory(dataset.cache_dir)
    record = records.measure(train_images, eval_images, dataset.value_range, cache_dir)
    record = record._replace(order=order)
    p_x = configs.likelihood(config, record)
    if earlier is not None and earlier.record is not None:
        records.check_same(record, earlier.record, f"--workdir={directory}")
        record = earlier.record
    else:
        records.check_values(record, train_images, eval_images, p_x.is_bounded)
        if p_x.needs_channel_basis:
            record = record._replace(channel_basis=_channel_basis(train_images))
    identity.warn_overlap(Identity(config, record), arrays, dataset.eval_split)
    model = configs.model(config, record, model)
    recipe = configs.recipe(config, num_steps, model)
    return Job(config, directory, mesh, recipe, train_images, eval_images, record, num_steps)


def _resolved(
    config: ml_collections.ConfigDict, arrays: Mapping[str, Pixels] | None
) -> ml_collections.ConfigDict:
    """The configuration with the sizes of its images, and what follows from them."""
    configs.check_fields(config, configs.base())
    config = ml_collections.ConfigDict(config.to_dict())
    if arrays is None:
        config.dataset.update(data.resolved(config.dataset.to_dict()))
    else:
        shape = next(iter(arrays.values())).shape[1:]
        data.check_shape(sizes.image_shape(config), shape)
        fields = dict(zip(data.SIDES, shape, strict=True))
        config.dataset.update(name=data.ARRAYS, **fields)
    return sizes.resolved(config)


def _channel_basis(images: Pixels) -> records.Basis:
    """The directions of the channels, of evenly spaced training images.

    One process computes them and gives them to all: they are constants of the compiled programs,
    and another machine may compute other last bits.
    """
    basis = np.zeros((images.shape[3],) * 2)
    if jax.process_index() == 0:
        count = max(1, min(len(images), _MOST_PIXELS // math.prod(images.shape[1:3])))
        chosen = images[np.linspace(0, len(images) - 1, count).astype(int)]
        basis = np.asarray(likelihoods.channel_basis(chosen))
    if jax.process_count() > 1:
        words = basis.view(np.uint32)  # JAX would round doubles
        basis = np.asarray(multihost_utils.broadcast_one_to_all(words)).view(np.float64)
    return tuple(tuple(float(value) for value in row) for row in basis)


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
            "images": job.record.to_json(),
            "--workdir": workdir.saved(job.directory),
        }
    )
