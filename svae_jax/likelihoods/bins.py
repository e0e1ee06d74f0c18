"""Probability masses of integers: a symmetric density, integrated over the bin of each."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from svae_jax.pixels import PixelRange

Values = Float[Array, "..."]


def log_bin_mass(
    images: Float[Array, "*s"],
    d: Float[Array, "*s"],
    delta: Values,
    *,
    pixels: PixelRange,
    log_interval: Callable[[Values, Values], Values],
    log_cdf: Callable[[Values], Values],
) -> Float[Array, "*s"]:
    """log P(x) of each value in nats; the bins at `PixelRange.ends` take the tails.

    Args:
        images: x in [-1, 1] or beyond, the middles of bins of width 2·half_bin.
        d: (x − μ)/s, for a location μ and a scale s.
        delta: δ = half_bin/s; broadcasts against d.
        pixels: which integers there are.
        log_interval: (d, δ) -> log(F(d + δ) − F(d − δ)), F the standard distribution function.
        log_cdf: t -> log F(t); the density is symmetric, so F(−t) = 1 − F(t).
    """
    delta = jnp.broadcast_to(delta, d.shape)
    log_mass = log_interval(d, delta)
    first, last = pixels.ends
    log_mass = jnp.where(images > last - pixels.half_bin, log_cdf(delta - d), log_mass)
    return jnp.where(images < first + pixels.half_bin, log_cdf(delta + d), log_mass)
