"""Loads a trained model from a workdir."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import PyTree, UInt8

from svae_jax import config as configs
from svae_jax import data
from svae_jax import model as models
from svae_jax.errors import UserError
from svae_jax.model import SpatialVAE
from svae_jax.run import checkpoint, workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained model; it unpacks as ``model, variables, config, step``.

    Attributes:
        model: the Flax module; `model.apply(variables, images, method="encode")` gives the
            posteriors' arrays, `method="decode"` the images of latents.
        variables: parameters and batch statistics; their moving averages if training kept them.
        config: the configuration of the run.
        step: number of optimiser updates.
    """

    model: SpatialVAE
    variables: PyTree
    config: ml_collections.ConfigDict
    step: int

    def __iter__(self) -> Iterator[Any]:
        """Yields the model, its variables, the configuration and the step."""
        return iter((self.model, self.variables, self.config, self.step))


def load(directory: str | Path, *, best: bool = False, model: SpatialVAE | None = None) -> Trained:
    """Loads a checkpoint of a run, with SHA-256 verified; executes nothing.

    Args:
        directory: the workdir of a run, finished or still training.
        best: the checkpoint with the highest `eval/elbo` instead of the newest.
        model: the model that was given to `training.loop.train`, if any.

    Raises:
        UserError: the directory is not a workdir, holds no intact checkpoint, or one of another
            model.
    """
    directory = Path(directory)
    config = configuration(directory)
    loaded = checkpoint.load(directory / "checkpoints", best=best)
    state = loaded.state.get("state")
    if state is None:
        raise UserError(f"{directory / 'checkpoints'}: none is of a training run")
    variables = state.get("ema") or {name: state.get(name) for name in ("params", "batch_stats")}
    variables = {name: arrays or {} for name, arrays in variables.items()}
    model = model or configs.model(config)
    _check_fits(directory, variables, model, config)
    return Trained(model, jax.tree.map(jnp.asarray, variables), config, loaded.step)


def _check_fits(
    directory: Path, variables: PyTree, model: SpatialVAE, config: ml_collections.ConfigDict
) -> None:
    """Checks that the arrays are those of the model; Flax itself would say so at the first use."""
    size, channels = config.dataset.image_size, config.dataset.channels
    expected = jax.eval_shape(lambda: models.init(model, jax.random.key(0), size, channels))
    shapes, wanted = (jax.tree.map(np.shape, tree) for tree in (variables, expected))
    if shapes != wanted:
        raise UserError(
            f"{directory}: the checkpoint is not of the model that its config.json describes; "
            "networks of your own are given to svae_jax.load(..., model=...)"
        )


def configuration(directory: str | Path) -> ml_collections.ConfigDict:
    """The configuration of a run.

    Raises:
        UserError: the directory is not a workdir, or its `config.json` is damaged.
    """
    fields: dict[str, Any] | None = workdir.read_json(Path(directory) / "config.json")
    if fields is None:
        raise UserError(f"{directory} is no workdir of a run: it holds no config.json")
    return configs.from_dict(fields)


def images(
    config: ml_collections.ConfigDict, split: str
) -> UInt8[np.ndarray, "num_images height width channels"]:
    """A split of the data set of a run, prepared as for training.

    Raises:
        UserError: the split or the data does not exist, or cannot be had.
    """
    fields = ("name", "image_size", "channels", "data_dir", "cache_dir")
    return data.load(split=split, **{field: config.dataset[field] for field in fields})
