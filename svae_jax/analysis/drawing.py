"""Writes images that a trained model draws or reconstructs."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Float, Num, PRNGKeyArray, UInt8

from svae_jax import data, image_files, seeds, sizes, terminal
from svae_jax.analysis import fitted, trained
from svae_jax.analysis.fitted import Fitted
from svae_jax.analysis.trained import Trained
from svae_jax.devices import batches, runtime, sharding
from svae_jax.devices.batches import Batch
from svae_jax.errors import UserError
from svae_jax.evaluation import grids, steps
from svae_jax.files import os_errors_for_user, user_path

Pixels = Num[np.ndarray, "_n h w c"]

_BATCH = 250  # images decoded at a time, or fewer large ones
_SHOWN = 64  # samples in the grid


@runtime.own_numerics()
def sample(
    directory: str | Path,
    sampler: str,
    out: str | Path,
    image_format: str,
    *,
    num: int,
    seed: int = 0,
    **options: Any,
) -> list[Path]:
    """Draws images with a sampler of a run and writes them, one batch in memory at a time.

    Args:
        directory: the workdir.
        sampler: one of `samplers.names()`.
        out: a file for "npz", a folder for "png".
        image_format: one of `image_files.FORMATS`.
        num: number of images, at least 1.
        seed: image i depends on the seed and i alone.
        **options: of `fitted.load_sampler`.

    Returns:
        What was written: `out`, and the grid beside it.

    Raises:
        UserError: a mistake that the user can correct; nothing is overwritten.
    """
    if num < 1:
        raise UserError(f"--num={num} must be at least 1")
    key = seeds.key(seed)
    target, grid = _targets(out, image_format)
    directory = user_path(directory, "--workdir")
    model = trained.load(directory)
    _check_format(model, image_format)
    loaded = fitted.load_sampler(directory, sampler, model, **options)
    drawn = draw(model, loaded, key, num)
    first = next(drawn)
    with tqdm.tqdm(total=num, unit=" images", disable=None, file=terminal.stderr()) as bar:
        pixels = (model.pixels.from_float(batch) for batch in itertools.chain([first], drawn))
        shape = (num, *first.shape[1:])
        image_files.write(target, image_format, shape, _counted(pixels, bar), model.pixels.dtype)
    return _save_grid(grid, grids.grid(first[:_SHOWN]), target)


def _check_format(model: Trained, image_format: str) -> None:
    channels = model.config.dataset.channels
    if image_format == "png" and (model.pixels.dtype != "uint8" or channels not in (1, 3)):
        raise UserError(
            f"--format=png holds 8-bit images of 1 or 3 channels; this run's are "
            f"{model.pixels.dtype} with {channels}: use --format=npz"
        )


def draw(
    model: Trained, sampler: Fitted, key: PRNGKeyArray, count: int
) -> Iterator[Float[np.ndarray, "_n h w c"]]:
    """Batches of images ``[_, h, w, c]``, not clipped; image i depends on the key and i alone."""
    size = batches.size_for(sizes.image_shape(model.config), _BATCH)
    for batch in sampler.batches(key, count, size):
        images = steps.decode(model.model, model.variables, batch.rows)
        yield sharding.on_host(images)[: batch.size]


@runtime.own_numerics()
def reconstruct(
    directory: str | Path,
    pictures: Sequence[str | Path],
    out: str | Path,
    image_format: str,
    seed: int = 0,
) -> list[Path]:
    """Reconstructs picture files, prepared as the run's data were, and writes them in order.

    Returns:
        What was written: `out`, and the grid beside it of pictures above their reconstructions.

    Raises:
        UserError: a mistake that the user can correct; nothing is overwritten.
    """
    key = seeds.key(seed)
    target, grid = _targets(out, image_format)
    directory = user_path(directory, "--workdir")
    model = trained.load(directory)
    _check_format(model, image_format)
    if model.pixels.dtype != "uint8":
        raise UserError(f"--reconstruct: this run is of {model.pixels.dtype}, not of pictures")
    shape = sizes.image_shape(model.config)
    originals = data.read_pictures(pictures, image_shape=shape, field="--reconstruct")

    def from_one_sample(batch: Batch) -> Float[Array, "b h w c"]:
        batch_key = jax.random.fold_in(key, batch.begin)
        return steps.reconstruct(model.model, model.variables, batch_key, batch.rows)

    size = batches.size_for(shape, min(_BATCH, len(originals)))
    images = batches.over(from_one_sample, originals, size)
    reconstructed = np.concatenate([model.pixels.from_float(part) for part in images])
    image_files.write(target, image_format, reconstructed.shape, iter([reconstructed]))
    return _save_grid(grid, grids.pairs(originals[:_SHOWN], reconstructed[:_SHOWN]), target)


def _targets(out: str | Path, image_format: str) -> tuple[Path, Path]:
    """The file or folder of the images, and the file of the grid; neither holds anything yet."""
    target = user_path(out, "--out")
    # Only a file has a suffix: a folder may be called t0.5.
    grid = target.with_name(f"{target.stem if image_format == 'npz' else target.name}.png")
    if grid.exists() or grid == target:
        raise UserError(f"--out={out}: the grid {grid} exists; remove it, or choose another --out")
    image_files.check_target(target, image_format)
    return target, grid


def _save_grid(path: Path, grid: UInt8[np.ndarray, "h w c"], target: Path) -> list[Path]:
    with os_errors_for_user(f"{path} cannot be written"):
        image_files.save_picture(path, grid)
    return [target, path]


def _counted(batches: Iterable[Pixels], bar: tqdm.tqdm) -> Iterator[Pixels]:
    for batch in batches:
        yield batch
        bar.update(len(batch))
