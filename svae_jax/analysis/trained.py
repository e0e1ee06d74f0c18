"""Loads a trained model from a workdir."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float, Num, PyTree

from svae_jax import config as configs
from svae_jax import data, sizes
from svae_jax import model as models
from svae_jax.data import images as image_lib
from svae_jax.data import record as records
from svae_jax.data.record import Record
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds
from svae_jax.model import SpatialVAE
from svae_jax.pixels import PixelRange
from svae_jax.run import checkpoint, workdir

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
    """

    model: SpatialVAE
    variables: PyTree
    config: ml_collections.ConfigDict
    step: int
    scale: Float[np.ndarray, "*k"] | None = dataclasses.field(default=None, kw_only=True)
    arrays: Mapping[str, Pixels] | None = dataclasses.field(default=None, kw_only=True)

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
            UserError: the split or the data does not exist, or cannot be had.
        """
        dataset = self.config.dataset
        return data.load_of(dataset.to_dict(), self.arrays, split or dataset.eval_split)


def load(
    directory: str | Path,
    *,
    best: bool = False,
    model: SpatialVAE | None = None,
    images: Any = None,
) -> Trained:
    """Loads a checkpoint of a run, with SHA-256 verified; executes nothing.

    Args:
        directory: the workdir of a run, finished or still training.
        best: the checkpoint with the highest `eval/elbo` instead of the newest.
        model: the model that was given to `training.loop.train`, if any.
        images: the arrays that were given to it, if any; only what needs the images needs them.

    Raises:
        UserError: the directory is not a workdir, holds no intact checkpoint, or one of another
            model; or the images are not those of the run.
    """
    directory = Path(directory)
    config = configuration(directory)
    record = _record(directory)
    arrays = None if images is None else _checked(image_lib.from_python(images), config, record)
    loaded = checkpoint.load(directory / "checkpoints", best=best)
    state = loaded.state.get("state")
    if state is None:
        raise UserError(f"{directory / 'checkpoints'}: none is of a training run")
    variables = state.get("ema") or {name: state.get(name) for name in ("params", "batch_stats")}
    variables = {name: leaves or {} for name, leaves in variables.items()}
    model = configs.model(config, record, model)
    _check_fits(directory, variables, model)
    assert model.likelihood is not None
    variables = jax.tree.map(jnp.asarray, variables)
    scale = bounds.known_scale(model.likelihood, variables)
    if scale is None:
        scale = bounds.scale_of(model.likelihood, loaded.metrics, "eval/")
    return Trained(model, variables, config, loaded.step, scale=scale, arrays=arrays)


def _record(directory: Path) -> Record | None:
    """Which images the run is of; None for a run of an older version, on 8-bit images."""
    fields = workdir.read_json(directory / "data.json")
    return None if fields is None else Record.from_json(fields)


def _checked(
    arrays: dict[str, Pixels], config: ml_collections.ConfigDict, record: Record | None
) -> dict[str, Pixels]:
    """The arrays, if they are those of the run."""
    dataset, shape = config.dataset, list(sizes.image_shape(config))
    for name, array in arrays.items():
        if list(array.shape[1:]) != shape:
            raise UserError(f"images: {name} is of {list(array.shape[1:])}, the run of {shape}")
    train, held_out = (
        data.load_of(dataset.to_dict(), arrays, split)
        for split in (dataset.split, dataset.eval_split)
    )
    if record is not None:
        cache_dir = data.cache_directory(dataset.cache_dir)
        found = records.measure(train, held_out, dataset.value_range, cache_dir)
        records.check_same(found, record, "images")
    return arrays


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


def configuration(directory: str | Path) -> ml_collections.ConfigDict:
    """The configuration of a run.

    Raises:
        UserError: the directory is not a workdir, or its `config.json` is damaged.
    """
    fields: dict[str, Any] | None = workdir.read_json(Path(directory) / "config.json")
    if fields is None:
        raise UserError(f"{directory} is no workdir of a run: it holds no config.json")
    return configs.from_dict(fields)
