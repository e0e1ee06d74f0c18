"""Images as users have them: arrays in the units of the run's data, files, Pillow's images."""

import functools
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

from svae_jax import data
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.pixels import UINT8, PixelRange

_SLACK = 1e-3  # of the range of floats, for values that were computed


@runtime.own_numerics()
def prepare(
    images: Any, *, image_shape: tuple[int, int, int], pixels: PixelRange = UINT8
) -> Float[np.ndarray, "n height width channels"]:
    """Brings images to the form that the model sees, float32 in [-1, 1].

    Args:
        images: one or many, `[height, width, channels]` or `[n, height, width, channels]` (grey
            ones without the last axis too), in the units of the run's data: its own integers, or
            any floats for a run on floats. For a run on 8-bit images also floats **in [-1, 1]**;
            the path of a picture or a Pillow image, of any size, from which the largest
            part of the right aspect is cut out and resized as for training on a folder; or a list
            of these.
        image_shape: height, width and channels that the model expects.
        pixels: what the values of the run's pixels mean.

    Raises:
        UserError: another shape, dtype or range, with what was expected; or a file that cannot be
            read.
    """
    if isinstance(images, np.ndarray | np.generic | jax.Array):
        return _from_array(np.asarray(images), image_shape, pixels)
    if not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise UserError("images: there is none")
    if any(isinstance(image, np.ndarray | jax.Array) for image in images):
        parts = [prepare(image, image_shape=image_shape, pixels=pixels) for image in images]
        return np.concatenate(parts)
    channels = image_shape[2]
    if pixels.dtype != "uint8" or channels not in (1, 3):
        raise UserError(
            f"images: this run is of {pixels.dtype} with {channels} channels; give arrays of "
            "these, not pictures"
        )
    read = data.read_pictures(images, image_shape=image_shape, field="images")
    return _to_float(read, pixels)


def _from_array(
    images: np.ndarray, shape: tuple[int, int, int], pixels: PixelRange
) -> Float[np.ndarray, "n height width channels"]:
    height, width, channels = shape
    given = images.shape
    if channels == 1 and images.shape[-2:] == (height, width):
        images = images[..., None]
    if images.shape[-3:] != shape or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"images: shape {list(given)} is not that of this model's images, {list(shape)} or "
            f"[n, {height}, {width}, {channels}]"
        )
    images = images.reshape(-1, *shape)
    is_float = np.issubdtype(images.dtype, np.floating)
    if images.dtype == pixels.dtype or (is_float and not pixels.is_integer):
        if not np.isfinite(images).all():
            raise UserError("images: some values are NaN or infinite")
        return _to_float(images, pixels)
    if pixels.dtype != "uint8":
        wanted = pixels.dtype if pixels.is_integer else "floats"
        raise UserError(f"images must be {wanted}, as the run's data, got dtype {images.dtype}")
    if not is_float:
        raise UserError(
            f"images must be uint8 levels or floats in [-1, 1], got dtype {images.dtype}"
        )
    low, high = images.min(), images.max()
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):  # NaN compares false
        raise UserError(
            f"images of floats must lie in [-1, 1], got {low:.4g} to {high:.4g}; levels from 0 to "
            "255 must be uint8"
        )
    if low >= 0 and high > low:
        _warn_range()
    return images.astype(np.float32)


@functools.cache
def _warn_range() -> None:
    """Warns, once a process."""
    logging.warning(
        "images: floats from 0 to 1 are taken as part of [-1, 1], where 0 is the middle; if 0 is "
        "black, give 2 * images - 1"
    )


def _to_float(images: np.ndarray, pixels: PixelRange) -> np.ndarray:
    if images.dtype != np.uint8:
        return np.asarray(pixels.to_float(images))
    # By a table, so that nothing is compiled for each number of images.
    return np.asarray(pixels.to_float(np.arange(256, dtype=np.uint8)))[images]
