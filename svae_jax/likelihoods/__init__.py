"""Likelihoods p(x|z) of images in [-1, 1], given what a decoder emits: pure functions of arrays.

A likelihood holds the map on the decoder's last layer, the number of its outputs and the scale σ.
The rows of the table:

| name                   | log p(x|z)                          | scale σ               | outputs |
|------------------------|-------------------------------------|-----------------------|---------|
| `gaussian`             | density N(x; f(z), σ²I)             | one                   | tanh    |
| `gaussian_channels`    | density, Q diag(σ²) Qᵀ of a pixel   | one a direction, c    | tanh    |
| `gaussian_blocks`      | density, Q diag(σ²) Qᵀ of 2×2 pixels | one a direction, 4c  | tanh    |
| `laplace`              | density Laplace(x; f(z), σ)         | one                   | tanh    |
| `discretized_logistic` | mass of a logistic in each bin      | one, never "optimal"  | tanh    |
| `bernoulli`            | mass of 0 and 1                     | none                  | logits  |

    likelihood = likelihoods.make("gaussian", image_shape=(32, 32, 3))
    outputs = likelihood.activate(decoder(z))  # [batch, 32, 32, likelihood.num_outputs]
    scale = likelihood.training_scale(images, outputs, log_sigma=None)
    loss = kl - likelihood.mean_log_prob(scale, images, outputs)

Densities of different likelihoods can be compared, and so can masses, but not one with the other.
`log_mass` gives masses for all of them, where the images hold integers.

A likelihood of your own is one file with a subclass of `Likelihood` that gives `log_prob` and
`sample`, and one line in the table below.
"""

from typing import Any

from svae_jax.likelihoods.base import Likelihood
from svae_jax.likelihoods.bernoulli import Bernoulli
from svae_jax.likelihoods.gaussian import (
    ChannelBasis,
    Gaussian,
    GaussianBlocks,
    GaussianChannels,
    channel_basis,
)
from svae_jax.likelihoods.laplace import Laplace
from svae_jax.likelihoods.logistic import DiscretizedLogistic
from svae_jax.pixels import UINT8, PixelRange

__all__ = ["Likelihood", "channel_basis", "default_pixels", "make", "names"]

_TABLE: dict[str, type[Likelihood]] = {
    "gaussian": Gaussian,
    "gaussian_channels": GaussianChannels,
    "gaussian_blocks": GaussianBlocks,
    "laplace": Laplace,
    "discretized_logistic": DiscretizedLogistic,
    "bernoulli": Bernoulli,
}


def names() -> tuple[str, ...]:
    """The names of the likelihoods."""
    return tuple(_TABLE)


def default_pixels(name: str) -> PixelRange:
    """What the values of pixels mean where the images are not known yet.

    Raises:
        ValueError: an unknown name.
    """
    return _row(name).default_pixels


def make(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    pixels: PixelRange = UINT8,
    sigma: str = "optimal",
    channel_basis: ChannelBasis | None = None,
) -> Likelihood:
    """The likelihood of this name.

    Args:
        name: one of `names()`.
        image_shape: height, width and channels of an image.
        pixels: what the values of the images' pixels mean.
        sigma: "learned", "optimal", or a number as text (see `Likelihood`).
        channel_basis: orthonormal directions of the channels as rows, such as
            `likelihoods.channel_basis` gives; for the likelihoods with `needs_channel_basis`, where
            None stands for the channels themselves. The others ignore it.

    Raises:
        ValueError: an unknown name, or a value that the likelihood does not take; the message names
            the field.
    """
    row = _row(name)
    basis: dict[str, Any] = {"channel_basis": channel_basis} if row.needs_channel_basis else {}
    return row(image_shape, pixels, sigma, **basis)


def _row(name: str) -> type[Likelihood]:
    if name not in _TABLE:
        raise ValueError(f"likelihood must be one of {', '.join(_TABLE)}, got {name!r}")
    return _TABLE[name]
