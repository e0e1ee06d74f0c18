"""Verified checkpoints: a restored state is exactly the saved one, or an error.

Each step is one Orbax checkpoint `directory/<step>` with two items: `state`, the arrays, and
`meta`, a JSON object with the configuration, the versions of the libraries, the metrics and a
SHA-256 of every array, sealed by a SHA-256 of itself. Orbax alone silently restores a flipped bit
and silently casts a wrong dtype.

The state is copied to the host once and saved as NumPy arrays. The next training step may therefore
reuse the device's buffers at once, a background thread hashes and writes, and a checkpoint does not
depend on the devices it was saved from.
"""

from svae_jax.run.checkpoint.arrays import fingerprint
from svae_jax.run.checkpoint.manager import (
    Checkpointer,
    NoneIntactError,
    are_lost,
    load,
    remove,
    versions,
)
from svae_jax.run.checkpoint.reading import Loaded

__all__ = [
    "Checkpointer",
    "Loaded",
    "NoneIntactError",
    "are_lost",
    "fingerprint",
    "load",
    "remove",
    "versions",
]
