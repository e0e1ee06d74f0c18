"""The Gaussian with a covariance of rows ⊗ columns ⊗ maps, for latents of any size."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64

from svae_jax.samplers import base
from svae_jax.samplers.base import Keys


class Modes(NamedTuple):
    """The aggregate posterior's mean, and its covariance within each axis, summed over the others.

    Attributes:
        mean: E[z], ``[h, w, n]``.
        rows: Σ over columns and maps of Cov[z_i.., z_j..], ``[h, h]``.
        cols: the same of the columns, ``[w, w]``.
        maps: the same of the maps, ``[n, n]``.
    """

    mean: Float64[np.ndarray, "h w n"]
    rows: Float64[np.ndarray, "h h"]
    cols: Float64[np.ndarray, "w w"]
    maps: Float64[np.ndarray, "n n"]


def modes(batches: Iterable[Float[np.ndarray, "_b h w n"]]) -> Modes:
    """Adds up the modes of latents z ~ q(z), in float64 on the host.

    Raises:
        ValueError: there is no batch.
    """
    count, total = 0, np.zeros(())
    products: list[np.ndarray] = []
    for batch in batches:
        z = batch.astype(np.float64)
        count, total = count + len(z), total + z.sum(axis=0)
        added = [_gram(z, axis) for axis in (1, 2, 3)]
        products = [a + b for a, b in zip(products, added, strict=True)] if products else added
    if count == 0:
        raise ValueError("batches must hold at least one image, got none")
    mean = total / count
    return Modes(mean, *(p / count - _gram(mean[None], i + 1) for i, p in enumerate(products)))


def _gram(z: Float64[np.ndarray, "b h w n"], axis: int) -> Float64[np.ndarray, "m m"]:
    flat = np.moveaxis(z, axis, 0).reshape(z.shape[axis], -1)
    return flat @ flat.T


@dataclass(frozen=True)
class Kronecker:
    """N(E[z], R⊗S⊗T) over rows, columns and maps, in closed form.

    If the covariance of z is such a product, its sum within an axis is proportional to that axis's
    factor; the scale is that of the total variance.

    Attributes:
        shape: height, width and maps of a latent.
    """

    shape: base.Shape

    def fit(self, found: Modes) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `sample`: `mean` ``[h, w, n]`` and three lower Cholesky factors."""
        variance = np.trace(found.maps)
        factors = {}
        for name in ("rows", "cols", "maps"):
            mode = getattr(found, name)
            scale = variance if name == "maps" else 1.0
            factors[name] = base.cholesky(mode * (scale / np.trace(mode))).astype(np.float32)
        return {"mean": found.mean.astype(np.float32), **factors}

    def sample(
        self, params: dict[str, Float[Array, "..."]], keys: Keys
    ) -> Float[Array, "count h w n"]:
        """Draws one latent for each key."""
        white = base.normal(keys, self.shape)
        factors = (params["rows"], params["cols"], params["maps"])
        coloured = jnp.einsum(
            "bijk,pi,qj,rk->bpqr", white, *factors, precision=lax.Precision.HIGHEST
        )
        return params["mean"] + coloured
