"""The embedded default: 32×32 scenes of discs, squares and triangles. Minutes on a CPU."""

import functools

import ml_collections

from svae_jax import config as config_lib
from svae_jax import sweeps


def get_config(arg: str = "lowrank") -> ml_collections.ConfigDict:
    """The configuration for `arg`, such as "lowrank,rank=2" (see `config.latent_from_arg`)."""
    config = config_lib.base()
    config.dataset.name = "shapes"
    config.model.encoder = "5x5/32/s2 5x5/64/s2 5x5/128/s2 3x3/256"
    config.model.decoder = "3x3/128 3x3/64 5x5/32/s2 5x5/image/s2"
    config_lib.latent_from_arg(config, arg, d=3, N=128, C=150)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine")
    config.num_steps = 600
    config.eval_every = 300
    config.sample_every = 100
    config.checkpoint.every = 300
    return config


sweep_models = sweeps.models
sweep_learning_rate = sweeps.learning_rate
sweep_objective = sweeps.objective
# N -> a decoder with as many parameters as the one above, whose N comes first.
_WIDTHS = {128: 128, 64: 192, 32: 256, 16: 307, 8: 341, 4: 361, 256: 77}
_DECODERS = {maps: f"3x3/{width} 3x3/64 5x5/32/s2 5x5/image/s2" for maps, width in _WIDTHS.items()}
sweep_latents = functools.partial(sweeps.latent_sizes, _DECODERS, lengths=(50, 150, 500))
sweep_choices = functools.partial(sweeps.choices, {maps: _DECODERS[maps] for maps in (64, 256)})
sweep_candidates = functools.partial(sweeps.candidates, _DECODERS)
