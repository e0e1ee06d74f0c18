"""The Laplace likelihood, whose errors are absolute."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.likelihoods.base import Images, Likelihood, Outputs, Scale
from svae_jax.likelihoods.bins import log_bin_mass


@dataclass(frozen=True)
class Laplace(Likelihood):
    """Laplace(x; f(z), b), independent; the scale b is the mean absolute deviation."""

    has_optimal: ClassVar[bool] = True
    unit_stddev: ClassVar[float] = math.sqrt(2)

    def error(self, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """The absolute error of each image."""
        return jnp.sum(jnp.abs(images - outputs), axis=(-3, -2, -1))

    def optimal_scale(self, mean_error: Float[Array, ""]) -> Scale:
        """The mean absolute error, at least `min_sigma`."""
        return jnp.maximum(mean_error / math.prod(self.image_shape), self.min_sigma)

    def log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """The log-density over [-1, 1]: Σ −|x − f(z)|/b − log 2b."""
        error = self.error(images, outputs)
        return -error / scale - math.prod(self.image_shape) * jnp.log(2 * scale)

    def log_mass(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log P(x|z): the mass in the bin of each integer; the first and last take the tails."""
        half_bin = self.pixels.half_bin
        log_mass = log_bin_mass(
            images,
            (images - outputs) / scale,
            half_bin / scale,
            pixels=self.pixels,
            log_interval=_log_interval,
            log_cdf=_log_cdf,
        )
        return jnp.sum(log_mass, axis=(-3, -2, -1))

    def sample(self, key: PRNGKeyArray, scale: Scale, outputs: Outputs) -> Images:
        """f(z) + bε."""
        return outputs + scale * jax.random.laplace(key, outputs.shape, outputs.dtype)


def _log_interval(d: Float[Array, "*s"], delta: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log(F(d + δ) − F(d − δ)), with expm1 for the digits of narrow bins."""
    beside = delta - jnp.abs(d) - math.log(2) + jnp.log(-jnp.expm1(-2 * delta))
    holds_mode = jnp.abs(d) < delta
    inside = jnp.where(holds_mode, d, 0.0)  # finite elsewhere, as gradients need
    around = jnp.log(-0.5 * (jnp.expm1(inside - delta) + jnp.expm1(-inside - delta)))
    return jnp.where(holds_mode, around, beside)


def _log_cdf(t: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(t > 0, jnp.log1p(-0.5 * jnp.exp(-jnp.abs(t))), t - math.log(2))
