"""The Gaussian with the aggregate posterior's mean and full covariance."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from svae_jax.samplers import base
from svae_jax.samplers.aggregate import Posteriors
from svae_jax.samplers.base import Keys
from svae_jax.samplers.conditional import Factors


@dataclass(frozen=True)
class Gaussian(base.ClosedForm):
    """N(E[z], Cov[z]) over all h·w·n entries, where z follows the aggregate posterior.

    Attributes:
        shape: height, width and maps of a latent.
    """

    shape: base.Shape

    def check_shape(self) -> None:
        """Raises ValueError above 8,192 latents."""
        base.check_latents(self.shape)

    def fit(self, posteriors: Posteriors) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `sample`: `mean` ``[d]`` and the lower Cholesky `factor` ``[d, d]``."""
        moments = posteriors.moments
        return {
            "mean": moments.mean.astype(np.float32),
            "factor": base.cholesky(moments.covariance).astype(np.float32),
        }

    def factors(self, params: PyTree) -> Factors:
        """The mean, and the covariance of all entries."""
        factor = np.asarray(params["factor"], np.float64)
        mean = np.asarray(params["mean"], np.float64).reshape(self.shape)
        return Factors(mean, factor @ factor.T, np.eye(1))

    def sample(
        self, params: dict[str, Float[Array, "..."]], keys: Keys
    ) -> Float[Array, "count h w n"]:
        """Draws one latent for each key."""
        white = base.normal(keys, params["mean"].shape)
        z = params["mean"] + jnp.dot(white, params["factor"].T, precision=lax.Precision.HIGHEST)
        return z.reshape(-1, *self.shape)

    def density(
        self, params: dict[str, Float[np.ndarray, "..."]]
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `log_prob`: the mean, what whitens, and the factor's log determinant."""
        factor = np.asarray(params["factor"])
        return {
            "mean": np.asarray(params["mean"]),
            "whitening": base.inverse(factor).astype(np.float32),
            "log_det": base.log_det(factor).astype(np.float32),
        }

    def log_prob(
        self, arrays: dict[str, Float[Array, "..."]], z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch"]:
        """log p(z) in nats."""
        centred = z.reshape(*z.shape[:-3], -1) - arrays["mean"]
        white = jnp.dot(centred, arrays["whitening"].T, precision=lax.Precision.HIGHEST)
        return base.normal_log_prob(white) - arrays["log_det"]
