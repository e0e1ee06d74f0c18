"""Many images as one picture with transparent gaps, so that it stands on any ground."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from svae_jax.analysis.exploring import locality

# Pixels of a tile's longer side; images are enlarged or shrunk by whole factors.
_MIN_TILE, _MAX_TILE = 64, 96
_GAP = 4
# Colours from low to high, evenly spaced: dark to light, so that they read in grey too.
_HEAT = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])

Tiles = UInt8[np.ndarray, "n _h _w 3"]
Picture = UInt8[np.ndarray, "_height _width 4"]


def tiles(images: UInt8[np.ndarray, "n h w c"]) -> Tiles:
    """Pictures, grey or colour, as tiles."""
    levels = np.round(_shrunk(images.astype(np.float64))).astype(np.uint8)
    return _enlarged(np.broadcast_to(levels, (*levels.shape[:-1], 3)))


def heat(values: Float[np.ndarray, "n h w"], top: float | None = None) -> Tiles:
    """Maps of numbers from 0 to `top` as tiles; by default, each to its own largest."""
    tops = np.maximum(values.max((1, 2), keepdims=True) if top is None else np.float64(top), 1e-30)
    place = _shrunk(values / tops).clip(0, 1)
    grid = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(place, grid, channel) for channel in _HEAT.T], axis=-1)
    return _enlarged(np.round(colours).astype(np.uint8))


def framed(tile: UInt8[np.ndarray, "h w 3"], cell: tuple[int, int], shape: tuple[int, int]) -> Any:
    """A tile with a white frame around the patch of one of `shape` cells."""
    rows, cols = (
        np.flatnonzero(owner == index)
        for owner, index in zip(locality.owners(shape, tile.shape[:2]), cell, strict=True)
    )
    result = tile.copy()
    for row in rows[[0, -1]]:
        result[row, cols] = 255
    for col in cols[[0, -1]]:
        result[rows, col] = 255
    return result


def grid(tiles: Tiles, columns: int, row_gaps: Sequence[int] = (_GAP,)) -> Picture:
    """Tiles row by row; the gaps under the rows take turns, as under originals and their copies."""
    n, h, w, _ = tiles.shape
    columns = min(columns, n)
    count = math.ceil(n / columns)
    tops = np.cumsum([0, *(h + row_gaps[i % len(row_gaps)] for i in range(count - 1))])
    picture = np.zeros((tops[-1] + h, columns * (w + _GAP) - _GAP, 4), np.uint8)
    for i, tile in enumerate(tiles):
        top, left = tops[i // columns], i % columns * (w + _GAP)
        picture[top : top + h, left : left + w, :3] = tile
        picture[top : top + h, left : left + w, 3] = 255
    return picture


def beside(*pictures: Picture) -> Picture:
    """Pictures side by side, aligned at the top."""
    height = max(len(picture) for picture in pictures)
    parts = []
    for picture in pictures:
        missing = height - len(picture)
        parts += [
            np.zeros((height, 4 * _GAP, 4), np.uint8),
            np.pad(picture, ((0, missing), (0, 0), (0, 0))),
        ]
    return np.concatenate(parts[1:], axis=1)


def _shrunk(images: Float[np.ndarray, "n h w *c"]) -> Float[np.ndarray, "n _h _w *c"]:
    """Means of blocks, as small as a tile may be large; what fills no block is left out."""
    n, h, w, *channels = images.shape
    factor = math.ceil(max(h, w) / _MAX_TILE)
    images = images[:, : h // factor * factor, : w // factor * factor]
    return images.reshape(n, h // factor, factor, w // factor, factor, *channels).mean((2, 4))


def _enlarged(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n _h _w c"]:
    factor = math.ceil(_MIN_TILE / max(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)
