"""The prior N(0, I), with a temperature."""

from dataclasses import dataclass

from jaxtyping import Array, Float, PyTree

from svae_jax.samplers import base
from svae_jax.samplers.base import Keys


@dataclass(frozen=True)
class Prior:
    """N(0, temperature²·I); it has no arrays and needs no fit.

    Attributes:
        shape: height, width and maps of a latent.
        temperature: the standard deviation; 1 is the prior of training.

    Raises:
        ValueError: the temperature is negative.
    """

    shape: base.Shape
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Checks the temperature."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above, got temperature={self.temperature}")

    def sample(self, params: PyTree, keys: Keys) -> Float[Array, "count h w n"]:
        """Draws one latent for each key; `params` is not used and may be None."""
        del params
        return self.temperature * base.normal(keys, self.shape)
