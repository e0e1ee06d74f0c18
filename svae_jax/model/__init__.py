"""The model: encoder, posterior and decoder as one Flax module, and its objective."""

from svae_jax.model.vae import Outputs, SpatialVAE, init, make

__all__ = ["Outputs", "SpatialVAE", "init", "make"]
