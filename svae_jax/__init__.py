"""Spatial variational auto-encoders via matrix-variate normal distributions, in JAX and Flax.

from svae_jax import latents      # posteriors, as pure functions

run = svae_jax.load(workdir)      # a trained model to play with, see `svae_jax.analysis.exploring`
run = svae_jax.pretrained("shapes")  # one that comes with the package
"""

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svae_jax.analysis.exploring import load as load
    from svae_jax.analysis.pretrained import pretrained as pretrained

    __version__: str

__all__ = ["__version__", "load", "pretrained"]


def __getattr__(name: str) -> object:
    # Imported on first use, so that `from svae_jax import latents` does not import Orbax.
    if name == "load":
        from svae_jax.analysis.exploring import load

        return load
    if name == "pretrained":
        from svae_jax.analysis.pretrained import pretrained

        return pretrained
    if name == "__version__":
        try:
            return metadata.version("svae_jax")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
