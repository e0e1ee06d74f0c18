"""The prior, with a temperature."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from svae_jax import latents
from svae_jax.samplers import base
from svae_jax.samplers.base import Keys


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

    def sample(self, params: latents.Params, keys: Keys) -> Float[Array, "count h w n"]:
        """Draws one latent for each key; `params` are the prior's."""
        z = jax.vmap(lambda key: self.prior.sample(key, params, ()))(keys)
        mean = self.prior.mean(params)
        return mean + self.temperature * (z - mean)
