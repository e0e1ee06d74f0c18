"""Images as one array: decoded once, cached, and mapped into memory."""

from svae_jax.data.pictures import read_pictures
from svae_jax.data.splits import ARRAYS, cache_directory, load, load_of

__all__ = ["ARRAYS", "cache_directory", "load", "load_of", "read_pictures"]
