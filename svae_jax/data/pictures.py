"""Reads pictures of the user's as one array."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from svae_jax.data.decode import decode, to_array
from svae_jax.data.sources import folder
from svae_jax.data.sources.base import Reader
from svae_jax.errors import UserError


def read_pictures(
    pictures: Sequence[Any], *, image_shape: tuple[int, int, int], field: str
) -> UInt8[np.ndarray, "n height width channels"]:
    """Reads pictures, converted, cropped and resized as `load` does for a folder.

    Args:
        pictures: files, or Pillow's images, which are not changed.
        image_shape: height, width and channels of the result; 1 or 3 channels.
        field: what the errors call the pictures.

    Raises:
        UserError: naming the pictures that cannot be read or decoded, or that are neither a path
            nor an image.
    """

    def readers() -> Iterator[tuple[str, Reader]]:
        for i, picture in enumerate(pictures):
            if isinstance(picture, Image.Image):
                yield f"image {i}", picture.copy
            elif isinstance(picture, str | os.PathLike):
                yield str(picture), functools.partial(folder.open_image, Path(picture))
            else:
                kind = type(picture).__name__
                raise UserError(
                    f"{field}: {kind} is not an array, a path of a picture or a Pillow image"
                )

    convert = functools.partial(to_array, image_shape=image_shape, crop=None)
    count = len(pictures)
    return np.concatenate(
        list(decode(readers(), convert, count=count, title="pictures", field=field))
    )
