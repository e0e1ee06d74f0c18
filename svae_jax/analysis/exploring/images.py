"""Images as users have them: arrays of levels or of floats, files, Pillow's images."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from svae_jax import data
from svae_jax.errors import UserError
from svae_jax.model import pixels as pixel_ops

_SLACK = 1e-3  # of the range of floats, for values that were computed


def prepare(images: Any, *, size: int, channels: int) -> Float[np.ndarray, "n size size channels"]:
    """Brings images to the form that the model sees, float32 in [-1, 1].

    Args:
        images: one or many: uint8 levels or floats **in [-1, 1]**, `[size, size, channels]` or
            `[n, size, size, channels]` (grey ones without the last axis too); the path of a PNG or
            JPEG file or a Pillow image, of any size, from which the largest square is cut out and
            resized as for training on a folder; or a list of these.
        size: height and width that the model expects.
        channels: channels that the model expects.

    Raises:
        UserError: another shape, dtype or range, with what was expected; or a file that cannot be
            read.
    """
    if isinstance(images, np.ndarray | np.generic | jax.Array):
        return _from_array(np.asarray(images), size, channels)
    if not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise UserError("images: there is none")
    if any(isinstance(image, np.ndarray | jax.Array) for image in images):
        parts = [prepare(image, size=size, channels=channels) for image in images]
        return np.concatenate(parts)
    pixels = data.read_pictures(images, image_size=size, channels=channels, field="images")
    return _to_float(pixels)


def _from_array(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    shape = (size, size, channels)
    given = images.shape
    if channels == 1 and images.shape[-2:] == (size, size):
        images = images[..., None]
    if images.shape[-3:] != shape or images.ndim not in (3, 4) or not images.size:
        raise UserError(
            f"images: shape {list(given)} is not that of this model's images, {list(shape)} or "
            f"[n, {size}, {size}, {channels}]"
        )
    images = images.reshape(-1, *shape)
    if images.dtype == np.uint8:
        return _to_float(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"images must be uint8 levels or floats in [-1, 1], got dtype {images.dtype}"
        )
    low, high = images.min(), images.max()
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):  # NaN compares false
        raise UserError(
            f"images of floats must lie in [-1, 1], got {low:.4g} to {high:.4g}; levels from 0 to "
            "255 must be uint8"
        )
    return images.astype(np.float32)


def _to_float(levels: np.ndarray) -> np.ndarray:
    # By a table, so that nothing is compiled for each number of images.
    return np.asarray(pixel_ops.to_float(np.arange(256, dtype=np.uint8)))[levels]
