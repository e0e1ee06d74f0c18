"""The Gaussian with a covariance of rows ⊗ columns ⊗ maps, for latents of any size."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from svae_jax.samplers import base
from svae_jax.samplers.aggregate import Posteriors
from svae_jax.samplers.base import Keys

_AXES = ("rows", "cols", "maps")


@dataclass(frozen=True)
class Kronecker(base.ClosedForm):
    """N(E[z], R⊗S⊗T) over rows, columns and maps, in closed form.

    If the covariance of z is such a product, the covariance along an axis, summed over the two
    others, is proportional to that axis's factor; the scale is that of the total variance.

    Attributes:
        shape: height, width and maps of a latent.
    """

    shape: base.Shape

    def fit(self, posteriors: Posteriors) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `sample`: `mean` ``[h, w, n]`` and three lower Cholesky factors."""
        found = posteriors.axis_covariances
        variance = np.trace(found.maps)
        factors = {}
        for name in _AXES:
            along = getattr(found, name)
            scale = variance if name == "maps" else 1.0
            factors[name] = base.cholesky(along * (scale / np.trace(along))).astype(np.float32)
        return {"mean": found.mean.astype(np.float32), **factors}

    def sample(
        self, params: dict[str, Float[Array, "..."]], keys: Keys
    ) -> Float[Array, "count h w n"]:
        """Draws one latent for each key."""
        white = base.normal(keys, self.shape)
        return params["mean"] + _along_axes(white, params)

    def density(
        self, params: dict[str, Float[np.ndarray, "..."]]
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `log_prob`: the mean, what whitens each axis, and the log determinant."""
        factors = {name: np.asarray(params[name]) for name in _AXES}
        total = math.prod(self.shape)
        # det(R⊗S⊗T) has each determinant once for each entry of the other two axes.
        log_det = sum(total / len(f) * base.log_det(f) for f in factors.values())
        whitening = {name: base.inverse(f).astype(np.float32) for name, f in factors.items()}
        return {
            "mean": np.asarray(params["mean"]),
            **whitening,
            "log_det": np.asarray(log_det, np.float32),
        }

    def log_prob(
        self, arrays: dict[str, Float[Array, "..."]], z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch"]:
        """log p(z) in nats."""
        white = _along_axes(z - arrays["mean"], arrays)
        return base.normal_log_prob(white.reshape(*z.shape[:-3], -1)) - arrays["log_det"]


def _along_axes(
    z: Float[Array, "*batch h w n"], matrices: dict[str, Float[Array, "..."]]
) -> Float[Array, "*batch h w n"]:
    """Multiplies rows, columns and maps by a matrix each."""
    three = (matrices[name] for name in _AXES)
    return jnp.einsum("...ijk,pi,qj,rk->...pqr", z, *three, precision=lax.Precision.HIGHEST)
