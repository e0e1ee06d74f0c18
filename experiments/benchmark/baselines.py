"""The baselines: the same network of plain Flax layers and in PyTorch."""

import json

import jax

from experiments.benchmark import plain_flax, workloads
from experiments.benchmark.stopwatch import Contender
from svae_jax import config as configs
from svae_jax.evaluation import steps

_PLAIN, _EAGER, _COMPILED = "plain Flax", "PyTorch, eager", "PyTorch, torch.compile"
NAMES = {"plain": (_PLAIN,), "pytorch": (_EAGER, _COMPILED)}  # by the words of --against


def contender(part: str, name: str, config_json: str) -> Contender:
    """What a baseline, one of `NAMES`, is timed for: "training" or "generation"."""
    config = configs.from_dict(json.loads(config_json))
    recipe, images = workloads.recipe(config), workloads.noise(config)
    if name == _PLAIN:
        recipe = plain_flax.of(recipe)
        if part == "training":
            return workloads.simple_training(recipe, images)
        return workloads.generation(recipe, generate=jax.jit(steps.generate, static_argnums=(0, 3)))
    from experiments.benchmark import pytorch

    state, compiled = workloads.initial_state(recipe), name == _COMPILED
    network = pytorch.make(recipe, state.params, state.batch_stats)
    if part == "training":
        learning_rate = config.optimizer.learning_rate
        return pytorch.training(network, images, config.batch_size, learning_rate, compiled)
    return pytorch.generation(network, workloads.GENERATED, compiled)
