"""Images as one array: decoded once, cached, and mapped into memory."""

from svae_jax.data.pictures import read_pictures
from svae_jax.data.splits import load

__all__ = ["load", "read_pictures"]
