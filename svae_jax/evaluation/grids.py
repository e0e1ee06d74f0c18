"""Many images as one picture.

An image is `[h, w, c]`, uint8 or floating point in [-1, 1]. One channel is shown grey, three in
colour, and others side by side.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from svae_jax import pixels as pixel_lib

_PAPER = 255  # white between the tiles

Pixels = UInt8[np.ndarray, "height width _c"]
Batch = UInt8[Array | np.ndarray, "*b h w c"] | Float[Array | np.ndarray, "*b h w c"]


def grid(images: Batch, columns: int | None = None, padding: int = 2, min_tile: int = 64) -> Pixels:
    """Lays images out row by row, on white.

    Args:
      images: `[*b, h, w, c]`, at least one; batch axes are flattened.
      columns: images a row; by default near the square root of their number, and a divisor of it
        if there is one, so that every row is full.
      padding: width in pixels of the gaps and of the border.
      min_tile: enlarges small images by the smallest whole factor that makes their longer side at
        least this many pixels; 1 never enlarges.

    Returns:
      uint8 `[height, width, 1 or 3]`, on the host.

    Raises:
      ValueError: there is no image, `columns` or `min_tile` is below 1, or `padding` below 0.
    """
    tiles = _tiles(images, min_tile)
    return _lay_out(
        tiles, _near_square(len(tiles)) if columns is None else columns, padding, padding
    )


def pairs(
    originals: Batch,
    reconstructions: Batch,
    columns: int | None = None,
    padding: int = 2,
    min_tile: int = 64,
) -> Pixels:
    """Lays originals out with the reconstruction of each right below it.

    The gap under a pair is four times the gap within it, which shows what belongs together.

    Args:
      originals: `[*b, h, w, c]`, at least one.
      reconstructions: the same shape.
      columns: pairs a row; by default such that the picture is near a square.
      padding: width in pixels of the gap within a pair, between columns, and of the border.
      min_tile: as in `grid`.

    Returns:
      uint8 `[height, width, 1 or 3]`, on the host.

    Raises:
      ValueError: as `grid`, or the shapes differ.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"reconstructions: shape {reconstructions.shape} is not that of originals, "
            f"{originals.shape}"
        )
    above, below = _tiles(originals, min_tile), _tiles(reconstructions, min_tile)
    n, _, width, channels = above.shape
    gap = np.full((n, padding, width, channels), _PAPER, np.uint8)
    tall = np.concatenate([above, gap, below], axis=1)
    return _lay_out(
        tall, _near_square(n, aspect=2.0) if columns is None else columns, 4 * padding, padding
    )


def row(
    pictures: Sequence[UInt8[np.ndarray, "height _width c"]], gap: int = 16
) -> UInt8[np.ndarray, "height _row c"]:
    """Lays pictures of one height out side by side, on white."""
    height, _, channels = pictures[0].shape
    space = np.full((height, gap, channels), _PAPER, np.uint8)
    parts = [part for picture in pictures for part in (space, picture)]
    return np.concatenate(parts[1:], axis=1)


def _tiles(images: Batch, min_tile: int) -> UInt8[np.ndarray, "n height width _c"]:
    if images.ndim < 3 or 0 in images.shape:
        raise ValueError(
            f"images: shape {images.shape} is not [..., h, w, c] with one image at least"
        )
    if min_tile < 1:
        raise ValueError(f"min_tile: {min_tile} is below 1")
    pixels = images if images.dtype == np.uint8 else pixel_lib.to_uint8(images)
    tiles = side_by_side(np.asarray(jax.device_get(pixels)).reshape(-1, *images.shape[-3:]))
    factor = math.ceil(min_tile / max(tiles.shape[1:3]))
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def side_by_side(images: Num[np.ndarray, "n h w c"]) -> Num[np.ndarray, "n h _w _c"]:
    """Images of other than 1 or 3 channels with their channels side by side, in grey."""
    n, h, w, channels = images.shape
    if channels in (1, 3):
        return images
    return np.moveaxis(images, -1, 2).reshape(n, h, w * channels, 1)


def _near_square(n: int, aspect: float = 1.0) -> int:
    """Columns for n tiles, `aspect` times as high as wide: a divisor of n if one is near."""
    ideal = math.sqrt(n * aspect)
    divisors = [k for k in range(math.ceil(ideal), n + 1) if n % k == 0 and k <= 2 * ideal]
    return divisors[0] if divisors else math.ceil(ideal)


def _lay_out(
    tiles: UInt8[np.ndarray, "n h w c"], columns: int, row_gap: int, padding: int
) -> Pixels:
    if columns < 1:
        raise ValueError(f"columns: {columns} is below 1")
    if padding < 0:
        raise ValueError(f"padding: {padding} is below 0")
    n, h, w, c = tiles.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    height = rows * (h + row_gap) - row_gap + 2 * padding
    width = columns * (w + padding) + padding
    picture = np.full((height, width, c), _PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        top = padding + i // columns * (h + row_gap)
        left = padding + i % columns * (w + padding)
        picture[top : top + h, left : left + w] = tile
    return picture
