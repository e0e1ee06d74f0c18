"""Checkpoints that are verified: what is restored is what was saved, or nothing is.

Each step is one Orbax checkpoint `directory/<step>` of two items: `state`, the arrays, and `meta`,
a JSON object of the configuration, the versions of the libraries, the metrics and a SHA-256 over
every array, sealed by a SHA-256 over itself. Orbax alone restores a flipped bit silently and casts
a wrong dtype silently.

The state is saved as NumPy arrays, copied to the host once. So the next train step may reuse the
device's buffers at once, hashing and writing happen in a background thread, and a checkpoint does
not depend on the devices it was saved from.
"""

from svae_jax.run.checkpoint.arrays import fingerprint
from svae_jax.run.checkpoint.manager import Checkpointer, Loaded, load

__all__ = ["Checkpointer", "Loaded", "fingerprint", "load"]
