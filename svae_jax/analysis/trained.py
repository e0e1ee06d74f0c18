"""Loads a trained model from a workdir."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float, Num, PyTree

from svae_jax import config as configs
from svae_jax import files, identity
from svae_jax import model as models
from svae_jax.data import images as image_lib
from svae_jax.data.record import Record
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds
from svae_jax.identity import Identity
from svae_jax.model import SpatialVAE
from svae_jax.pixels import PixelRange
from svae_jax.run import checkpoint

Pixels = Num[np.ndarray, "num_images height width channels"]


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained model; it unpacks as ``model, variables, config, step``.

    Attributes:
        model: the Flax module; `model.apply(variables, images, method="encode")` gives the
            posteriors' arrays, `method="decode"` the decoder's outputs for latents.
        variables: parameters and batch statistics; their moving averages if training kept them.
        config: the configuration of the run.
        step: number of training steps.
        scale: σ of the likelihood: given, learned, or fixed on training images; None for an
            optimal σ where this checkpoint was not evaluated.
        arrays: the arrays from Python that the run is of, by the names of their splits, if given.
        record: what the run's images are; None for a run of an older version.
        data_dir: where the data are, if that was given; else they are where they were.
        where: the workdir, for messages.
    """

    model: SpatialVAE
    variables: PyTree
    config: ml_collections.ConfigDict
    step: int
    scale: Float[np.ndarray, "*k"] | None = dataclasses.field(default=None, kw_only=True)
    arrays: Mapping[str, Pixels] | None = dataclasses.field(default=None, kw_only=True)
    record: Record | None = dataclasses.field(default=None, kw_only=True)
    data_dir: str = dataclasses.field(default="", kw_only=True)
    where: str = dataclasses.field(default="the run", kw_only=True)

    def __iter__(self) -> Iterator[Any]:
        """Yields the model, its variables, the configuration and the step."""
        return iter((self.model, self.variables, self.config, self.step))

    @property
    def pixels(self) -> PixelRange:
        """What the values of the images' pixels mean."""
        return self.model.pixels

    def images(self, split: str = "") -> Pixels:
        """Images of the run's data set: `dataset.eval_split`, or a split such as "test[:8]".

        Raises:
            UserError: the split or the data does not exist, or is not the run's, or cannot be had.
        """
        run = Identity(self.config, self.record)
        split = split or self.config.dataset.eval_split
        return identity.images(run, self.arrays, split, self.where, self.data_dir)

    def warn_overlap(self, split: str) -> None:
        """Warns if a split shares images with the one that the model was trained on."""
        run = Identity(self.config, self.record)
        identity.warn_overlap(run, self.arrays, split, self.where, self.data_dir)


@runtime.own_numerics()
def load(
    directory: str | Path,
    *,
    best: bool = False,
    model: SpatialVAE | None = None,
    images: Any = None,
    data_dir: str | Path = "",
) -> Trained:
    """Loads a checkpoint of a run, with SHA-256 verified; executes nothing.

    Args:
        directory: the workdir of a run, finished or still training.
        best: the checkpoint with the highest `eval/elbo` instead of the newest.
        model: the model that was given to `training.loop.train`, if any.
        images: the arrays that were given to it, if any; only what needs the images needs them.
        data_dir: where the run's data set is now, if it has moved.

    Raises:
        UserError: the directory is not a workdir, holds no intact checkpoint, or one of another
            model; or the images are not those of the run.
    """
    directory = files.user_path(directory, "--workdir")
    config, record = run = identity.read(directory)
    arrays = None
    if images is not None:
        arrays = image_lib.from_python(images)
        identity.check_arrays(run, arrays)
    loaded = checkpoint.load(directory / "checkpoints", best=best)
    variables = variables_of(loaded, directory)
    model = configs.model(config, record, model)
    _check_fits(directory, variables, model)
    assert model.likelihood is not None
    variables = jax.tree.map(jnp.asarray, variables)
    scale = bounds.known_scale(model.likelihood, variables)
    if scale is None:
        scale = bounds.scale_of(model.likelihood, loaded.metrics, "eval/")
    return Trained(
        *(model, variables, config, loaded.step),
        scale=scale,
        arrays=arrays,
        record=record,
        data_dir=identity.absolute(os.fspath(data_dir), "--data_dir"),
        where=str(directory),
    )


def variables_of(loaded: checkpoint.Loaded, directory: Path) -> dict[str, PyTree]:
    """The variables of a run's checkpoint, or their moving averages if training kept them.

    Raises:
        UserError: the checkpoint is of something else.
    """
    state = loaded.state.get("state")
    if state is None:
        raise UserError(f"{directory / 'checkpoints'}: none is of a training run")
    variables = state.get("ema") or {name: state.get(name) for name in ("params", "batch_stats")}
    return {name: leaves or {} for name, leaves in variables.items()}


def _check_fits(directory: Path, variables: PyTree, model: SpatialVAE) -> None:
    """Checks that the arrays are those of the model; Flax itself would say so at the first use."""
    assert model.likelihood is not None
    shape = model.likelihood.image_shape
    expected = jax.eval_shape(lambda: models.init(model, jax.random.key(0), shape))
    shapes, wanted = (jax.tree.map(np.shape, tree) for tree in (variables, expected))
    if shapes != wanted:
        raise UserError(
            f"{directory}: the checkpoint is not of the model that its config.json describes; "
            "networks of your own are given to svae_jax.load(..., model=...)"
        )
