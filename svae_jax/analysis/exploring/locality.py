"""How far a latent cell reaches: the energy of the decoder's Jacobian over the image.

For the images f(z) of a decoder, the energy of the cell (i, j) at the pixel (y, x) is

    E[i, j, y, x] = Σ_k Σ_c (∂f_yxc / ∂z_ijk)²

over the maps k and the channels c: the squared change of the pixel, summed over unit changes of the
cell's entries.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from svae_jax.devices import compiler, runtime
from svae_jax.model import SpatialVAE, with_lax_convolutions
from svae_jax.model.networks import Decoder

_CHUNK = 64  # columns of the Jacobian at a time

Energy = Float[np.ndarray, "h w height width"]


class Locality(NamedTuple):
    """How far the cells of a model reach.

    The share and the spread weigh each cell by its energy. The `uniform_*` ones are the same for a
    decoder in which every cell changes every pixel equally. A `vector` has one cell, whose patch is
    the whole image: its share is 1, and says nothing.

    Attributes:
        energy: E, `[h, w, height, width]`.
        own_share: share of the energy inside the cell's own patch (see `owners`), 0 to 1.
        spread: root mean square distance of the energy to its cell's centre of energy, in pixels.
        uniform_own_share: `own_share` of equal energy everywhere, near 1 / (h·w).
        uniform_spread: `spread` of equal energy everywhere.
    """

    energy: Energy
    own_share: float
    spread: float
    uniform_own_share: float
    uniform_spread: float


def owners(
    shape: tuple[int, int], image_shape: tuple[int, int]
) -> tuple[Int[np.ndarray, " height"], Int[np.ndarray, " width"]]:
    """The row of cells that owns each row of pixels, and the column that owns each column.

    The image is cut into h×w equal patches; a pixel belongs to the one in which its centre lies.
    """
    rows, cols = (
        (np.arange(size) + 0.5) * cells // size
        for cells, size in zip(shape, image_shape, strict=True)
    )
    return rows.astype(int), cols.astype(int)


def summarise(energy: Energy) -> Locality:
    """The share and the spread of an energy, and those of equal energy everywhere."""
    return Locality(energy, *_share_and_spread(energy), *_share_and_spread(np.ones_like(energy)))


def _share_and_spread(energy: Energy) -> tuple[float, float]:
    h, w, *image_shape = energy.shape
    rows, cols = owners((h, w), (image_shape[0], image_shape[1]))
    is_own = (rows == np.arange(h)[:, None])[:, None, :, None]
    is_own = is_own & (cols == np.arange(w)[:, None])[None, :, None, :]
    total = energy.sum()
    variance = 0.0
    for along in (energy.sum(-1), energy.sum(-2)):  # [h, w, rows] and [h, w, columns]
        place, weight = np.arange(along.shape[-1]), along.sum(-1, keepdims=True)
        centre = (along * place).sum(-1, keepdims=True) / np.maximum(weight, 1e-300)
        variance += (along * (place - centre) ** 2).sum() / total
    own = np.where(is_own, energy, 0).sum() / total
    return float(own), float(np.sqrt(variance))


@runtime.own_numerics()
def energy(
    model: SpatialVAE,
    variables: PyTree,
    z: Float[np.ndarray, "h w n"],
    cell: tuple[int, int] | None = None,
    chunk: int = _CHUNK,
) -> Float[np.ndarray, "cells height width"]:
    """E at one latent, exact, in memory that does not grow with the number of entries.

    Args:
        model: the networks and the posterior.
        variables: the evaluated variables.
        z: the latent.
        cell: row and column of one cell; None for all, row by row.
        chunk: entries of the latent at a time.
    """
    h, w, n = z.shape
    first, last = (0, h * w) if cell is None else (cell[0] * w + cell[1], cell[0] * w + cell[1] + 1)
    total: np.ndarray | None = None
    for start in range(first * n, last * n, chunk):
        squares = np.asarray(_squared_columns(model, variables, jnp.asarray(z), start, chunk))
        squares = squares[: last * n - start].astype(np.float64)
        if total is None:
            total = np.zeros((last - first, *squares.shape[1:]))
        np.add.at(total, (start + np.arange(len(squares))) // n - first, squares)
    assert total is not None  # a latent has one entry at least
    return total


@functools.partial(compiler.jit, static_argnums=(0, 4))
def _squared_columns(
    model: SpatialVAE,
    variables: PyTree,
    z: Float[Array, "h w n"],
    start: Array | int,
    count: int,
) -> Float[Array, "{count} height width"]:
    """(∂f/∂z_e)² summed over channels, for the entries e from `start`; zero past the last one."""
    entries = start + jnp.arange(count)
    tangents = jax.nn.one_hot(entries, z.size, dtype=z.dtype).reshape(count, *z.shape)

    model = with_lax_convolutions(model)

    def decode(z: Array) -> Any:
        return model.apply(variables, z, method="decode")

    z = jnp.broadcast_to(z, tangents.shape)
    if isinstance(model.decoder, Decoder):
        _, columns = jax.jvp(decode, (z,), (tangents,))
    else:
        # A network of the user's own may hold a `jax.custom_vjp`, which has no forward mode. But
        # g -> Jᵀg is linear, and its own reverse mode gives the columns.
        images, transposed = jax.vjp(decode, z)
        _, product = jax.vjp(lambda cotangents: transposed(cotangents)[0], jnp.zeros_like(images))
        (columns,) = product(tangents)
    return jnp.sum(jnp.square(columns), axis=-1)
