"""Filling in: what is under a mask is drawn from its distribution given the rest of an image.

Cells whose own patches touch the mask are unknown. The encoder sees the pixels around a cell too,
so the hole must hold something: it is filled with the current estimate, encoded, and estimated
again. Nothing of what lies under the mask is ever read.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num

from svae_jax.analysis.exploring import locality
from svae_jax.samplers.conditional import Conditional

MAX_ROUNDS = 30
_TOLERANCE = 1 / 255  # of pixels in [-1, 1]: half a level of 8 bits

Image = Float[np.ndarray, "height width c"]
Latent = Float[np.ndarray, "h w n"]


class Filled(NamedTuple):
    """An image, several times filled in.

    Attributes:
        images: the draws, `[num, height, width, channels]`.
        mean: the image of the conditional mean, `[1, height, width, channels]`.
        cells: the latent cells that were drawn, `[h, w]`.
    """

    images: Num[np.ndarray, "num height width c"]
    mean: Num[np.ndarray, "1 height width c"]
    cells: Bool[np.ndarray, "h w"]


def cells_under(
    mask: Bool[np.ndarray, "height width"], shape: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """The cells in whose own patches (see `locality.owners`) any pixel is masked."""
    rows, cols = locality.owners(shape, mask.shape)
    cells = np.zeros(shape, bool)
    y, x = np.nonzero(mask)
    cells[rows[y], cols[x]] = True
    return cells


def estimate(
    encode: Callable[[Image], Latent],
    decode: Callable[[Latent], Image],
    image: Image,
    mask: Bool[np.ndarray, "height width"],
    conditional: Conditional,
) -> Latent:
    """The latent of an image with a hole: posterior means, and conditional means in the hole.

    It starts at the mean of the latents, and ends when the pixels in the hole move by less than
    half a level, or after `MAX_ROUNDS`.
    """
    hole = decode(conditional.mean.astype(np.float32))
    for _ in range(MAX_ROUNDS):
        z = conditional.expected(encode(np.where(mask[..., None], hole, image)))
        before, hole = hole, decode(z)
        if not mask.any() or np.abs(hole - before)[mask].max() < _TOLERANCE:
            break
    return z
