"""Spatial variational auto-encoders via matrix-variate normal distributions, in JAX and Flax.

from svae_jax import latents      # posteriors, as pure functions

run = svae_jax.load(workdir)      # a trained model to play with, see `svae_jax.analysis.exploring`
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svae_jax.analysis.exploring import load as load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    # Imported on first use, so that `from svae_jax import latents` does not import Orbax.
    if name == "load":
        from svae_jax.analysis.exploring import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
