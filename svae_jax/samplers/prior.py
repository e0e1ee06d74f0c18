"""The prior, with a temperature."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from svae_jax import latents
from svae_jax.samplers import base
from svae_jax.samplers.base import Keys
from svae_jax.samplers.conditional import Factors


@dataclass(frozen=True)
class Prior(base.ClosedForm):
    """The model's prior; it needs no fit, and its arrays are the model's own.

    Attributes:
        prior: p(z).
        temperature: the factor on deviations from the prior's mean; 1 is the prior of training.

    Raises:
        ValueError: the temperature is negative.
    """

    prior: latents.Prior
    temperature: float = 1.0

    options: ClassVar[tuple[str, ...]] = ("temperature",)

    def __post_init__(self) -> None:
        """Checks the temperature."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, got temperature={self.temperature}")

    @property
    def shape(self) -> base.Shape:
        """Height, width and maps of a latent."""
        return self.prior.height, self.prior.width, self.prior.maps

    def factors(self, params: latents.Params) -> Factors:
        """The mean, and the covariance as two factors.

        Raises:
            ValueError: the prior is no Gaussian of this form.
        """
        factors = getattr(self.prior, "covariance_factors", None)
        if factors is None:
            raise ValueError(f"the prior {self.prior.name!r} has no covariance in closed form")
        first, second = factors(params)
        mean = np.asarray(self.prior.mean(params), np.float64)
        return Factors(mean, self.temperature**2 * first, second)

    def sample(self, params: latents.Params, keys: Keys) -> Float[Array, "count h w n"]:
        """Draws one latent for each key; `params` are the prior's."""
        z = jax.vmap(lambda key: self.prior.sample(key, params, ()))(keys)
        mean = self.prior.mean(params)
        return mean + self.temperature * (z - mean)

    def density(self, params: latents.Params) -> latents.Params:
        """The arrays for `log_prob`: the prior's own.

        Raises:
            ValueError: the temperature is 0, where all latents are the mean.
        """
        if self.temperature == 0:
            raise ValueError("temperature must be above 0 for a density, got temperature=0.0")
        return params

    def log_prob(
        self, arrays: latents.Params, z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch"]:
        """log p(z) in nats."""
        mean = self.prior.mean(arrays)
        stretched = math.prod(self.shape) * math.log(self.temperature)
        return self.prior.log_prob(arrays, mean + (z - mean) / self.temperature) - stretched
