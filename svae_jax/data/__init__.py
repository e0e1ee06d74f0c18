"""Images as one array: decoded once, cached, and mapped into memory."""

from svae_jax.data.pictures import read_pictures
from svae_jax.data.sources import has_any_channels, locate
from svae_jax.data.sources.folder import BY_PATH, MIXED
from svae_jax.data.splits import (
    ARRAYS,
    SIDES,
    cache_directory,
    check_outside,
    check_shape,
    count_shared,
    load,
    load_of,
    resolved,
)

__all__ = [
    "ARRAYS",
    "BY_PATH",
    "MIXED",
    "SIDES",
    "cache_directory",
    "check_outside",
    "check_shape",
    "count_shared",
    "has_any_channels",
    "load",
    "load_of",
    "locate",
    "read_pictures",
    "resolved",
]
