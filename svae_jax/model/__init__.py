"""The model: encoder, posterior and decoder as one Flax module, and its objective."""

from svae_jax.model.vae import NONE, Outputs, SpatialVAE, init, make, num_params, start_at_pca

__all__ = ["NONE", "Outputs", "SpatialVAE", "init", "make", "num_params", "start_at_pca"]
