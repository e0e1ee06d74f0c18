"""The metrics of held-out images: each a number an image, and one row of `METRICS`.

From these rows follow `metrics.jsonl` and TensorBoard, `evaluation.json`, the tables of `evaluate`
and of comparisons, and the report.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from svae_jax.likelihoods import Likelihood


class Decoded(NamedTuple):
    """A batch of images, each decoded from one sample of its posterior.

    Attributes:
        likelihood: p(x|z).
        scale: its σ, fixed on training images.
        images: in [-1, 1].
        outputs: of the decoder.
        kl: KL(q(z|x) ‖ p(z)) in nats, of each image.
    """

    likelihood: Likelihood
    scale: Float[Array, "*s"]
    images: Float[Array, "b h w c"]
    outputs: Float[Array, "b h w k"]
    kl: Float[Array, " b"]

    @property
    def means(self) -> Float[Array, "b h w c"]:
        """The reconstructions, clipped to [-1, 1] as pictures are, and not rounded."""
        return jnp.clip(self.likelihood.mean(self.outputs).astype(jnp.float32), -1.0, 1.0)


class Metric(NamedTuple):
    """A row of `METRICS`.

    Attributes:
        function: a batch -> a number for each image, which are averaged.
        label: in tables, with the unit.
        section: of `evaluation.json`: "bounds", or "reconstruction".
        in_training: whether training evaluates it too, as `eval/NAME`.
        of_integers: whether it is of images of integers alone.
        digits: behind the point, where there is no standard error to round by.
    """

    function: Callable[[Decoded], Float[Array, " b"]]
    label: str
    section: str = "bounds"
    in_training: bool = True
    of_integers: bool = False
    digits: int = 1


def reconstruction(batch: Decoded) -> Float[Array, " b"]:
    """log p(x|z) in nats: of the density on [-1, 1], or as the likelihood says."""
    return batch.likelihood.log_prob(batch.scale, batch.images, batch.outputs)


def elbo(batch: Decoded) -> Float[Array, " b"]:
    """log p(x|z) − KL in nats: β = 1, no free bits."""
    return reconstruction(batch) - batch.kl


def bits_per_dim(batch: Decoded) -> Float[Array, " b"]:
    """The ELBO with the masses of the integers, in bits for each of an image's values."""
    nats = batch.likelihood.log_mass(batch.scale, batch.images, batch.outputs) - batch.kl
    return -nats / (math.prod(batch.likelihood.image_shape) * math.log(2))


def mse(batch: Decoded) -> Float[Array, " b"]:
    """Mean squared error of a pixel's channel in [-1, 1]."""
    return jnp.mean(jnp.square(batch.images - batch.means), axis=(1, 2, 3))


def psnr(batch: Decoded) -> Float[Array, " b"]:
    """10 log10(2² / mse), in decibels."""
    return 10 * jnp.log10(4 / mse(batch))


def ssim(batch: Decoded) -> Float[Array, " b"]:
    """Structural similarity (Wang et al. 2004), of each channel, averaged.

    Its Gaussian windows have 11×11 pixels and σ = 1.5, or as many as fit into the image.
    """
    import dm_pix  # here, so that training needs no package but JAX and Flax

    side = min(batch.images.shape[1:3])
    size = min(11, side - (side + 1) % 2)
    # Levels from 0: SSIM is not the same for shifted images.
    return dm_pix.ssim((batch.images + 1) / 2, (batch.means + 1) / 2, filter_size=size)


# name -> metric, in the order of the tables
METRICS: dict[str, Metric] = {
    "elbo": Metric(elbo, "ELBO, nats"),
    "bits_per_dim": Metric(bits_per_dim, "bits/dim", of_integers=True, digits=3),
    "reconstruction": Metric(reconstruction, "reconstruction, nats"),
    "kl": Metric(lambda batch: batch.kl, "KL, nats"),
    "mse": Metric(mse, "MSE", "reconstruction", in_training=False, digits=4),
    "psnr": Metric(psnr, "PSNR, dB", "reconstruction", in_training=False),
    "ssim": Metric(ssim, "SSIM", "reconstruction", in_training=False, digits=3),
}


def names(likelihood: Likelihood, in_training: bool) -> tuple[str, ...]:
    """The metrics that images of this likelihood have; in training, those for training alone."""
    return tuple(
        name
        for name, metric in METRICS.items()
        if (likelihood.pixels.is_integer or not metric.of_integers)
        and (metric.in_training or not in_training)
    )
