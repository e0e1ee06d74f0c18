"""Probability masses of integers: a symmetric density, integrated over the bin of each."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Values = Float[Array, "..."]


def log_bin_mass(
    images: Float[Array, "*s"],
    d: Float[Array, "*s"],
    delta: Values,
    *,
    half_bin: float,
    log_interval: Callable[[Values, Values], Values],
    log_cdf: Callable[[Values], Values],
) -> Float[Array, "*s"]:
    """log P(x) of each value in nats; the first and last bin take the tails.

    Args:
        images: x in [-1, 1], the middles of bins of width 2·half_bin.
        d: (x − μ)/s, for a location μ and a scale s.
        delta: δ = half_bin/s; broadcasts against d.
        half_bin: see `PixelRange`.
        log_interval: (d, δ) -> log(F(d + δ) − F(d − δ)), F the standard distribution function.
        log_cdf: t -> log F(t); the density is symmetric, so F(−t) = 1 − F(t).
    """
    delta = jnp.broadcast_to(delta, d.shape)
    log_mass = log_interval(d, delta)
    log_mass = jnp.where(images > 1 - half_bin, log_cdf(delta - d), log_mass)
    return jnp.where(images < -1 + half_bin, log_cdf(delta + d), log_mass)
