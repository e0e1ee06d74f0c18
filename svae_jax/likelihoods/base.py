"""What all likelihoods share: the settings, the scale σ, and defaults of the methods."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.pixels import UINT8, PixelRange

Images = Float[Array, "*b h w c"]
"""Images in [-1, 1], or beyond where the data are."""

Outputs = Float[Array, "*b h w k"]
"""What the decoder emits, after `Likelihood.activate`."""

Scale = Float[Array, "*s"]
"""The scale: one number, or one for each direction."""

_SCALES = 1e-8, 1e8  # of a fixed scale; beyond, squares of gradients leave float32


@dataclass(frozen=True)
class Likelihood:
    """p(x|z) of images x in [-1, 1], given the outputs of a decoder; nats an image.

    It holds settings and no arrays, so it is hashable and static under `jax.jit`. A subclass gives
    at least `log_prob` and `sample`; a row in the table of `likelihoods` gives it a name.

    Attributes:
        image_shape: height, width and channels of an image.
        pixels: what the values of the images' pixels mean.
        sigma: where the scale comes from. "learned": a parameter of the model, `log_sigma`.
            "optimal": the maximiser of the likelihood (Rybkin et al. 2021), of each batch in
            training, of training images in evaluation; for likelihoods with `has_optimal`. Or a
            number as text, in units of x in [-1, 1].

    Raises:
        ValueError: a value that the likelihood does not take; the message begins with the field.
    """

    image_shape: tuple[int, int, int]
    pixels: PixelRange = UINT8
    sigma: str = "optimal"

    has_scale: ClassVar[bool] = True
    """Whether there is a scale at all; without, methods ignore the argument `scale`."""

    has_optimal: ClassVar[bool] = False
    """Whether sigma="optimal" is possible: `error` and `optimal_scale` give it in closed form."""

    needs_channel_basis: ClassVar[bool] = False
    """Whether there is a field `channel_basis`, an orthonormal basis of the channels."""

    is_bounded: ClassVar[bool] = False
    """Whether no value may lie beyond the range of the pixels, held-out ones included."""

    is_discrete: ClassVar[bool] = False
    """Whether `log_prob` is of probability masses; else of a density over [-1, 1]."""

    emits_means: ClassVar[bool] = True
    """Whether the outputs are means of pixels in [-1, 1]."""

    unit_stddev: ClassVar[float] = 1.0
    """The standard deviation of the noise at scale 1."""

    default_pixels: ClassVar[PixelRange] = UINT8
    """Pixels that the likelihood takes, for checks before the images are known."""

    def __post_init__(self):
        """Checks sigma."""
        if not self.has_scale:
            if self.sigma != "optimal":
                raise ValueError(
                    f"sigma={self.sigma!r} does not apply to this likelihood, which has no scale; "
                    "leave it at 'optimal'"
                )
            return
        words = ("optimal", "learned") if self.has_optimal else ("learned",)
        if self.sigma not in words and not _is_scale(self.sigma):
            listed = ", ".join(map(repr, words))
            raise ValueError(
                f"sigma must be {listed} or a number from {_SCALES[0]:g} to {_SCALES[1]:g}, got "
                f"{self.sigma!r}"
            )

    # What the decoder emits.

    @property
    def num_outputs(self) -> int:
        """How many channels the decoder emits."""
        return self.image_shape[2]

    def activate(self, raw: Outputs) -> Outputs:
        """The map on the decoder's last layer: tanh, so that means lie in [-1, 1]."""
        return jnp.tanh(raw)

    def mean(self, outputs: Outputs) -> Images:
        """E[x|z], the image that is shown."""
        return outputs

    # The scale.

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scale."""
        return ()

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter of the model, `log_sigma` of `scale_shape`."""
        return self.has_scale and self.sigma == "learned"

    @property
    def given_scale(self) -> Scale | None:
        """The scale where it is a given number; one where there is none at all."""
        if not self.has_scale:
            return jnp.ones(self.scale_shape)
        if self.sigma in ("optimal", "learned"):
            return None
        return jnp.full(self.scale_shape, float(self.sigma), dtype=float)

    @property
    def min_sigma(self) -> float:
        """The smallest optimal σ, in units of x in [-1, 1].

        It keeps σ from collapsing on images that are reproduced exactly (Rybkin et al. 2021): 0.63
        of half a bin; floats have that of 8-bit images.
        """
        return math.exp(-6.0) * 255 * (self.pixels.half_bin if self.pixels.is_integer else 1 / 255)

    def error(self, images: Images, outputs: Outputs) -> Float[Array, "..."]:
        """Summed over an image: the statistic whose mean over images gives `optimal_scale`.

        Of shape [*b, *scale_shape].
        """
        raise NotImplementedError

    def optimal_scale(self, mean_error: Float[Array, "*s"]) -> Scale:
        """The scale of highest likelihood, from the mean of `error` over images."""
        raise NotImplementedError

    def training_scale(self, images: Images, outputs: Outputs, log_sigma: Scale | None) -> Scale:
        """The scale of a training step: learned, given, or optimal for the batch."""
        if log_sigma is not None:
            return jnp.exp(log_sigma)
        if (given := self.given_scale) is not None:
            return given
        # A constant: at the maximum, the likelihood has no slope in the scale.
        return jax.lax.stop_gradient(
            self.optimal_scale(jnp.mean(self.error(images, outputs), axis=0))
        )

    def reported_sigma(self, scale: Scale) -> Float[Array, ""]:
        """The scale as one number, for logs: of several, the root mean square."""
        return scale if scale.ndim == 0 else jnp.sqrt(jnp.mean(jnp.square(scale)))

    # Densities, masses, samples.

    def log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log p(x|z) in nats an image: of the density over [-1, 1], or as `is_discrete` says."""
        raise NotImplementedError

    def mean_log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, ""]:
        """The mean of `log_prob` over a batch: what training maximises."""
        return jnp.mean(self.log_prob(scale, images, outputs))

    def log_mass(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log P(x|z) in nats of images of integers, for bits/dim: the mass of each integer's bin.

        By default `log_prob` where `is_discrete`, else the density at the middle of the bin times
        its width.
        """
        if self.is_discrete:
            return self.log_prob(scale, images, outputs)
        num_dims = math.prod(self.image_shape)
        return self.log_prob(scale, images, outputs) + num_dims * math.log(2 * self.pixels.half_bin)

    def sample(self, key: PRNGKeyArray, scale: Scale, outputs: Outputs) -> Images:
        """Draws x, with the noise of the pixels."""
        raise NotImplementedError


def _is_scale(text: str) -> bool:
    try:
        return _SCALES[0] <= float(text) <= _SCALES[1]
    except ValueError:
        return False
