"""CIFAR-10, 32×32 (Wang, Yuan, Ji 2017, §4.2): N = 128 maps of 3×3, or a vector of C = 150.

`best` was chosen by the ELBO of short runs with a linear path on the validation split, as in
`sweep_linear`. `best_dense` has the dense encoder of the others, of 16 million parameters in place
of 0.4 million; `best_32` has that encoder too, and 32 maps in place of 48. `best_vector` is a
vector with the noise of `best`. `linear` and `mvn_linear` have the linear path, one σ and N(0, I),
with 8 maps of 8×8 and with the paper's. Of the models without that path (`experiments/results`),
`plain` is the one with the highest ELBO, `plain_vector` is among the best vectors, and the samples
of `best_samples` are among the closest to real images.
"""

import functools
import itertools

import ml_collections

from svae_jax import config as config_lib
from svae_jax import sweeps
from svae_jax.model import stacks

# N -> a decoder with as many parameters as the paper's, whose N comes first.
_STACK = "3x3/128 3x3/64 5x5/32/s2 5x5/image/s2"
_DECODERS = {
    maps: stacks.matching_stack(_STACK, maps=maps, like=128)
    for maps in (128, 64, 32, 16, 8, 4, 256)
}
# As many latents as an image has values.
_WIDE = {48: stacks.matching_stack(_STACK, maps=48, like=128)}
_ENCODER = "5x5/32/s2 5x5/128/s2 3x3/256"
_MODELS = sweeps.named(_DECODERS | _WIDE, maps=8, best=48, encoder=_ENCODER)
_MODELS["best_dense"] = sweeps.named(_DECODERS | _WIDE, maps=8, best=48)["best"]
_MODELS["best_32"] = sweeps.named(_DECODERS, maps=8)["best"]
_MODELS["best_samples"] = ("mvn", sweeps.SHORT)


def get_config(arg: str = "lowrank") -> ml_collections.ConfigDict:
    """The configuration for `arg`: a model of `_MODELS`, or such as "lowrank,rank=2"."""
    config = config_lib.base()
    config.dataset.update(name="cifar10", height=32, width=32, channels=3)
    config.model.encoder = "5x5/32/s2 5x5/64/s2 5x5/128/s2 3x3/256"
    config.model.decoder = _DECODERS[128]
    config.optimizer.learning_rate = 1e-4
    config.num_epochs = 100.0
    if arg in _MODELS:
        arg, changes = _MODELS[arg]
        config.update_from_flattened_dict(changes)
    config_lib.latent_from_arg(config, arg, others=_MODELS, d=3, N=128, C=150)
    return config


sweep_models = sweeps.models
sweep_linear = functools.partial(sweeps.linear, _DECODERS | _WIDE)
sweep_learning_rate = sweeps.learning_rate
sweep_objective = sweeps.objective
sweep_latents = functools.partial(sweeps.latent_sizes, _DECODERS, lengths=(50, 150, 500))
sweep_choices = functools.partial(sweeps.choices, {maps: _DECODERS[maps] for maps in (64, 256)})
sweep_refinements = functools.partial(sweeps.refinements, 8, 8, _DECODERS[8])


def sweep_vectors() -> sweeps.Sweep:
    """Lengths and learning rates of a vector without norms."""
    for rate, length in itertools.product((1e-3, 2e-3, 4e-3), (100, 150, 200)):
        changes = {"model.norm": "none", "optimizer.learning_rate": rate}
        yield {"posterior": f"vector,C={length}", **sweeps.SHORT, **changes}


def sweep_arithmetic() -> sweeps.Sweep:
    """Decoders of the same size whose weights are used at more places: most of them at 8×8.

    With the other decoders, large maps have this advantage over small ones.
    """
    widths = {
        "vector,N=32": 100,
        "mvn,d=2,N=64": 81,
        "mvn,d=3,N=32": 101,
        "mvn,d=4,N=16": 115,
        "mvn,d=6,N=8": 124,
        "mvn,d=8,N=8": 124,
    }
    for posterior, width in widths.items():
        decoder = f"3x3/{width} 3x3/96 5x5/64/s2 5x5/image/s2"
        yield {"posterior": posterior, "model.decoder": decoder, **sweeps.SHORT}
