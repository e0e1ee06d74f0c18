"""Images as one array: decoded once, cached, and mapped into memory."""

from svae_jax.data.pictures import read_pictures
from svae_jax.data.sources import has_any_channels
from svae_jax.data.splits import (
    ARRAYS,
    SIDES,
    cache_directory,
    check_shape,
    load,
    load_of,
    resolved,
)

__all__ = [
    "ARRAYS",
    "SIDES",
    "cache_directory",
    "check_shape",
    "has_any_channels",
    "load",
    "load_of",
    "read_pictures",
    "resolved",
]
