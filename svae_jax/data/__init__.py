"""Images as one array: decoded once, cached, and mapped into memory."""

from svae_jax.data.pictures import read_pictures
from svae_jax.data.sources import locate
from svae_jax.data.sources.folder import BY_PATH, MIXED
from svae_jax.data.splits import ARRAYS, cache_directory, count_shared, load, load_of

__all__ = [
    "ARRAYS",
    "BY_PATH",
    "MIXED",
    "cache_directory",
    "count_shared",
    "load",
    "load_of",
    "locate",
    "read_pictures",
]
