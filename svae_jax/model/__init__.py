"""The model: encoder, posterior and decoder as one Flax module, and its objective."""

from svae_jax.model.vae import (
    NONE,
    Outputs,
    SpatialVAE,
    check_can_start_at_pca,
    check_takes_path,
    encode,
    init,
    is_exact_at_pca,
    make,
    num_params,
    start_at_pca,
    with_lax_convolutions,
)

__all__ = [
    "NONE",
    "Outputs",
    "SpatialVAE",
    "check_can_start_at_pca",
    "check_takes_path",
    "encode",
    "init",
    "is_exact_at_pca",
    "make",
    "num_params",
    "start_at_pca",
    "with_lax_convolutions",
]
