"""The Gaussian with the aggregate posterior's mean and full covariance."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64

from svae_jax.samplers import base
from svae_jax.samplers.aggregate import Moments
from svae_jax.samplers.base import Keys

# Added to the diagonal, as shares of its mean, until the Cholesky factorisation succeeds.
_JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)


@dataclass(frozen=True)
class Gaussian:
    """N(E[z], Cov[z]) over all h·w·n entries, where z follows the aggregate posterior.

    Attributes:
        shape: height, width and maps of a latent.
    """

    shape: base.Shape

    def fit(self, moments: Moments) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `sample`: `mean` ``[d]`` and the lower Cholesky `factor` ``[d, d]``."""
        return {
            "mean": moments.mean.astype(np.float32),
            "factor": cholesky(moments.covariance).astype(np.float32),
        }

    def sample(
        self, params: dict[str, Float[Array, "..."]], keys: Keys
    ) -> Float[Array, "count h w n"]:
        """Draws one latent for each key."""
        white = base.normal(keys, params["mean"].shape)
        z = params["mean"] + jnp.dot(white, params["factor"].T, precision=lax.Precision.HIGHEST)
        return z.reshape(-1, *self.shape)


def cholesky(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """The lower Cholesky factor in float64.

    Where rounding makes the matrix indefinite, the smallest share of 1e-12, 1e-10, 1e-8 and 1e-6 of
    the mean of the diagonal that helps is added to the diagonal.

    Raises:
        ValueError: nothing helps: the matrix is not positive semi-definite, or not finite.
    """
    scale = np.mean(np.diag(covariance))
    if np.isfinite(scale):
        shifted = covariance.copy()
        for jitter in _JITTERS:
            np.fill_diagonal(shifted, np.diag(covariance) + jitter * scale)
            try:
                return np.linalg.cholesky(shifted)
            except np.linalg.LinAlgError:
                continue
    raise ValueError("covariance must be finite and positive semi-definite")
