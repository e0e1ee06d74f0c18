"""The Bernoulli likelihood, of images of two levels."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.likelihoods.base import Images, Likelihood, Outputs, Scale
from svae_jax.pixels import PixelRange


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """P(x = 1) = p and P(x = -1) = 1 − p, independent; the decoder emits the logits of p.

    Of floats between, `log_prob` is the negative cross-entropy, which is no distribution of them.
    """

    has_scale: ClassVar[bool] = False
    is_bounded: ClassVar[bool] = True
    is_discrete: ClassVar[bool] = True
    emits_means: ClassVar[bool] = False
    default_pixels: ClassVar[PixelRange] = PixelRange(high=1.0)

    def __post_init__(self):
        """Checks sigma and the range of the pixels."""
        super().__post_init__()
        low, high = self.pixels.low, self.pixels.high
        if (low, high) != (0, 1):
            raise ValueError(
                f"likelihood='bernoulli' is of pixels of range 0,1, got {low:g},{high:g}; set "
                "dataset.value_range=0,1 for values 0 and 1 or floats in [0, 1], or take another "
                "likelihood"
            )

    def activate(self, raw: Outputs) -> Outputs:
        """The identity: outputs are logits."""
        return raw

    def mean(self, outputs: Outputs) -> Images:
        """2p − 1."""
        return 2 * jax.nn.sigmoid(outputs) - 1

    def log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log P(x|z): Σ y log p + (1 − y) log(1 − p), for y = (x + 1)/2."""
        del scale
        y = (images + 1) / 2
        log_prob = y * jax.nn.log_sigmoid(outputs) + (1 - y) * jax.nn.log_sigmoid(-outputs)
        return jnp.sum(log_prob, axis=(-3, -2, -1))

    def sample(self, key: PRNGKeyArray, scale: Scale, outputs: Outputs) -> Images:
        """-1 or 1."""
        del scale
        ones = jax.random.bernoulli(key, jax.nn.sigmoid(outputs))
        return 2 * ones.astype(outputs.dtype) - 1
