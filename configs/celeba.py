"""CelebA, 64×64 (Wang, Yuan, Ji 2017, §4.1): N = 64 maps of 3×3, or a vector of C = 81.

`best` has the latent, prior and noise that were best in short runs on CIFAR-10 (`sweep_linear`);
`best_vector` is a vector with that noise. `plain` and `plain_vector` are the spatial model and the
vector of `sweep_candidates` with the highest ELBO (`experiments/results`).
"""

import functools

import ml_collections

from svae_jax import config as config_lib
from svae_jax import sweeps
from svae_jax.model import stacks

# N -> a decoder with as many parameters as that of N = 64, which comes first.
_STACK = "3x3/64 3x3/32 5x5/32/s2 5x5/16/s2 5x5/image/s2"
_DECODERS = {
    maps: stacks.matching_stack(_STACK, maps=maps, like=64) for maps in (64, 32, 16, 8, 4, 128)
}
_MODELS = sweeps.named(_DECODERS, maps=4)


def get_config(arg: str = "lowrank") -> ml_collections.ConfigDict:
    """The configuration for `arg`: a model of `_MODELS`, or such as "lowrank,rank=2"."""
    config = config_lib.base()
    config.dataset.update(name="celeb_a", height=64, width=64, channels=3, eval_split="validation")
    config.model.encoder = "5x5/32/s2 5x5/64/s2 5x5/128/s2/valid"
    config.model.decoder = _DECODERS[64]
    config.optimizer.learning_rate = 1e-4
    config.num_epochs = 20.0
    if arg in _MODELS:
        arg, changes = _MODELS[arg]
        config.update_from_flattened_dict(changes)
    config_lib.latent_from_arg(config, arg, others=_MODELS, d=3, N=64, C=81)
    return config


sweep_models = sweeps.models
sweep_linear = functools.partial(sweeps.linear, _DECODERS)
sweep_learning_rate = sweeps.learning_rate
sweep_objective = sweeps.objective
sweep_latents = functools.partial(sweeps.latent_sizes, _DECODERS, lengths=(27, 81, 243))
sweep_choices = functools.partial(sweeps.choices, {maps: _DECODERS[maps] for maps in (32, 128)})
sweep_candidates = functools.partial(sweeps.candidates, _DECODERS, lengths=(243,))
