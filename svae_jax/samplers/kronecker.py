"""The Gaussian with a covariance of rows ⊗ columns ⊗ maps, for latents of any size."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from svae_jax.samplers import base
from svae_jax.samplers.aggregate import Posteriors
from svae_jax.samplers.base import Keys


@dataclass(frozen=True)
class Kronecker(base.ClosedForm):
    """N(E[z], R⊗S⊗T) over rows, columns and maps, in closed form.

    If the covariance of z is such a product, its sum within an axis is proportional to that axis's
    factor; the scale is that of the total variance.

    Attributes:
        shape: height, width and maps of a latent.
    """

    shape: base.Shape

    def fit(self, posteriors: Posteriors) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `sample`: `mean` ``[h, w, n]`` and three lower Cholesky factors."""
        found = posteriors.modes
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
