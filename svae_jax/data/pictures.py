"""Reads picture files of the user's as one array."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from svae_jax.data.decode import decode, to_array
from svae_jax.data.sources import folder


def read_pictures(
    paths: Sequence[str | Path], *, image_size: int, channels: int
) -> UInt8[np.ndarray, "n height width channels"]:
    """Decodes PNG and JPEG files, converted, cropped and resized as `load` does for a folder.

    Raises:
        UserError: naming the files that cannot be read or decoded.
    """
    images = ((str(path), functools.partial(folder.open_image, Path(path))) for path in paths)
    convert = functools.partial(to_array, size=image_size, channels=channels, crop=None)
    batches = decode(images, convert, count=len(paths), title="pictures", field="--reconstruct")
    return np.concatenate(list(batches))
