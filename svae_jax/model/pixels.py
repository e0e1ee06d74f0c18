"""Uint8 levels, as files hold pixels, and floats in [-1, 1], as the model sees them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def to_float(pixels: UInt8[Array | np.ndarray, "*s"]) -> Float[Array, "*s"]:
    """Uint8 levels, as files hold pixels, and floats in [-1, 1], as the model sees them."""
    # Not x / 127.5 - 1: compiled, the division becomes a product, and white lies above 1.
    return (jnp.asarray(pixels).astype(jnp.float32) - 127.5) / 127.5


def to_uint8(values: Float[Array | np.ndarray, "*s"]) -> UInt8[Array, "*s"]:
    """Uint8 levels, as files hold pixels, and floats in [-1, 1], as the model sees them."""
    # In float32: bfloat16 holds 8 significant bits and would miss levels.
    levels = jnp.round((jnp.asarray(values).astype(jnp.float32) + 1.0) * 127.5)
    return jnp.where(jnp.isnan(levels), 0, jnp.clip(levels, 0, 255)).astype(jnp.uint8)
