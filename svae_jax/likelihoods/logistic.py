"""The discretized logistic likelihood (Kingma et al. 2016; Salimans et al. 2017, one component)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.likelihoods.base import Images, Likelihood, Outputs, Scale
from svae_jax.likelihoods.bins import log_bin_mass


@dataclass(frozen=True)
class DiscretizedLogistic(Likelihood):
    """The mass of a logistic distribution in the bin of each integer, independent.

    The scale s is in units of x in [-1, 1]; the standard deviation is πs/√3. Its optimum has no
    closed form.
    """

    is_discrete: ClassVar[bool] = True
    unit_stddev: ClassVar[float] = math.pi / math.sqrt(3)

    def __post_init__(self):
        """Checks sigma, and that the pixels are integers."""
        super().__post_init__()
        if not self.pixels.is_integer:
            raise ValueError(
                "likelihood='discretized_logistic' is of images of integers, got "
                f"{self.pixels.dtype}; take likelihood='gaussian' or 'laplace' for floats"
            )

    def log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log P(x|z): the mass in the bin of each integer; the first and last take the tails."""
        half_bin = self.pixels.half_bin
        log_mass = log_bin_mass(
            images,
            (images - outputs) / scale,
            half_bin / scale,
            pixels=self.pixels,
            log_interval=_log_interval,
            log_cdf=jax.nn.log_sigmoid,
        )
        return jnp.sum(log_mass, axis=(-3, -2, -1))

    def sample(self, key: PRNGKeyArray, scale: Scale, outputs: Outputs) -> Images:
        """f(z) + sε, rounded and clipped to the levels."""
        noise = jax.random.logistic(key, outputs.shape, outputs.dtype)
        level = jnp.round((outputs + scale * noise + 1) / (2 * self.pixels.half_bin))
        integers = self.pixels.low + jnp.clip(level, 0, self.pixels.high - self.pixels.low)
        return self.pixels.to_float(integers).astype(outputs.dtype)


def _log_interval(d: Float[Array, "*s"], delta: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log(F(d + δ) − F(d − δ)): F(d + δ) F(δ − d) (1 − e^(−2δ)), exactly."""
    return (
        jax.nn.log_sigmoid(d + delta)
        + jax.nn.log_sigmoid(delta - d)
        + jnp.log(-jnp.expm1(-2 * delta))
    )
