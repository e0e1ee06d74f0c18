"""CelebA, 64×64 (Wang, Yuan, Ji 2017, §4.1): N = 64 maps of 3×3, or a vector of C = 81."""

import functools

import ml_collections

from svae_jax import config as config_lib
from svae_jax import sweeps


def get_config(arg: str = "lowrank") -> ml_collections.ConfigDict:
    """The configuration for `arg`, such as "lowrank,rank=2" (see `config.latent_from_arg`)."""
    config = config_lib.base()
    config.dataset.update(name="celeb_a", image_size=64, eval_split="validation")
    config.model.encoder = "5x5/32/s2 5x5/64/s2 5x5/128/s2/valid"
    config.model.decoder = "3x3/64 3x3/32 5x5/32/s2 5x5/16/s2 5x5/image/s2"
    config_lib.latent_from_arg(config, arg, d=3, N=64, C=81)
    config.optimizer.learning_rate = 1e-4
    config.num_epochs = 20.0
    return config


sweep_models = sweeps.models
sweep_learning_rate = sweeps.learning_rate
sweep_objective = sweeps.objective
# N -> a decoder with as many parameters as the one above, whose N comes first.
_WIDTHS = {64: 64, 32: 96, 16: 128, 8: 153, 4: 170, 128: 38}
_DECODERS = {
    maps: f"3x3/{width} 3x3/32 5x5/32/s2 5x5/16/s2 5x5/image/s2" for maps, width in _WIDTHS.items()
}
sweep_latents = functools.partial(sweeps.latent_sizes, _DECODERS, lengths=(27, 81, 243))
sweep_choices = functools.partial(sweeps.choices, {maps: _DECODERS[maps] for maps in (32, 128)})
sweep_candidates = functools.partial(sweeps.candidates, _DECODERS, lengths=(243,))
