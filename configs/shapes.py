"""The embedded default: 32×32 scenes of discs, squares and triangles. Minutes on a CPU.

`best` was chosen by the ELBO of short runs with a linear path, as in `sweep_linear`; `best_vector`
is a vector with the same noise. `plain` and `plain_vector` are the spatial model and the vector of
`sweep_candidates` with the highest ELBO (`experiments/results`). `best_samples` is for samples by a
flow: few latents, without a linear path, five times as many training steps.
"""

import functools

import ml_collections

from svae_jax import config as config_lib
from svae_jax import sweeps
from svae_jax.model import stacks

# N -> a decoder with as many parameters as that of N = 128, which comes first.
_STACK = "3x3/128 3x3/64 5x5/32/s2 5x5/image/s2"
_DECODERS = {
    maps: stacks.matching_stack(_STACK, maps=maps, like=128)
    for maps in (128, 64, 32, 16, 8, 4, 256)
}
_MODELS = sweeps.named(_DECODERS, maps=4, encoder="5x5/32/s2 5x5/128/s2 3x3/256")
_MODELS["best_samples"] = (
    "mvn,d=4,N=16",
    {"model.norm": "none", "model.decoder": _DECODERS[16], "num_steps": 3000},
)


def get_config(arg: str = "lowrank") -> ml_collections.ConfigDict:
    """The configuration for `arg`: a model of `_MODELS`, or such as "lowrank,rank=2"."""
    config = config_lib.base()
    config.dataset.update(name="shapes", height=32, width=32, channels=3)
    config.model.encoder = "5x5/32/s2 5x5/64/s2 5x5/128/s2 3x3/256"
    config.model.decoder = _DECODERS[128]
    config.optimizer.update(learning_rate=1e-3, schedule="cosine")
    config.num_steps = 600
    if arg in _MODELS:
        arg, changes = _MODELS[arg]
        config.update_from_flattened_dict(changes)
    config_lib.latent_from_arg(config, arg, others=_MODELS, d=3, N=128, C=150)
    config.eval_every = 300
    config.sample_every = 100
    config.checkpoint.every = 300
    return config


sweep_models = sweeps.models
sweep_linear = functools.partial(sweeps.linear, _DECODERS)
sweep_learning_rate = sweeps.learning_rate
sweep_objective = sweeps.objective
sweep_latents = functools.partial(sweeps.latent_sizes, _DECODERS, lengths=(50, 150, 500))
sweep_choices = functools.partial(sweeps.choices, {maps: _DECODERS[maps] for maps in (64, 256)})
sweep_candidates = functools.partial(sweeps.candidates, _DECODERS)
