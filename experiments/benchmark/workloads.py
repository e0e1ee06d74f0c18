"""What the experiments time: training steps and the generation of images."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import PyTree, UInt8

from experiments.benchmark.stopwatch import Contender
from svae_jax import config as configs
from svae_jax import sizes
from svae_jax.devices import sharding
from svae_jax.evaluation import steps
from svae_jax.recipe import Recipe, stream
from svae_jax.training import feed, step
from svae_jax.training.metrics import TrainMetrics

NUM_IMAGES = 10_000  # to train on
GENERATED = 1000  # images at a time

Images = UInt8[np.ndarray, "n h w c"]


def noise(config: ml_collections.ConfigDict, count: int = NUM_IMAGES) -> Images:
    """Uniform noise in the shape of the configuration's images."""
    shape = (count, *sizes.image_shape(config))
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def recipe(config: ml_collections.ConfigDict, num_images: int = NUM_IMAGES) -> Recipe:
    """What a run on so many images trains."""
    return configs.recipe(config, configs.num_steps(config, num_images))


def training(recipe: Recipe, images: Images, resident_share: float = 1.0) -> Contender:
    """The training steps of a run: gather a batch, train, add up the metrics."""
    mesh = sharding.make_mesh()
    train_steps = feed.make(recipe, images, mesh, resident_share)
    init = jax.jit(
        lambda: (step.init_state(recipe), TrainMetrics.empty()),
        out_shardings=sharding.replicated(mesh),
    )
    (state, totals), at = init(), 0

    def run(num_steps: int) -> None:
        nonlocal state, totals, at
        stop = at + num_steps
        while at < stop:
            before = totals
            state, totals, made = train_steps(state, totals, at, stop - at)
            jax.block_until_ready(before)  # as the training loop does
            at += made
        jax.block_until_ready(state)

    return run


def simple_training(recipe: Recipe, images: Images) -> Contender:
    """Training steps as Flax users write them: one call for each, with a random batch."""
    on_device = jnp.asarray(images)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, images):
        key = jax.random.fold_in(stream(recipe.seed, "data"), state.step)
        chosen = jax.random.randint(key, (recipe.batch_size,), 0, len(images))
        return step.train_step(recipe, state, images[chosen])[0]

    state = jax.jit(step.init_state, static_argnums=0)(recipe)

    def run(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps):
            state = train_step(state, on_device)
        jax.block_until_ready(state)

    return run


def initial_variables(recipe: Recipe) -> dict[str, PyTree]:
    """The network's parameters and batch statistics before training."""
    state = jax.jit(step.init_state, static_argnums=0)(recipe)
    return {"params": state.params, "batch_stats": state.batch_stats}


def generation(
    recipe: Recipe, count: int = GENERATED, generate: Callable[..., jax.Array] = steps.generate
) -> Contender:
    """Batches of `count` images generated from the prior."""
    variables, key = initial_variables(recipe), stream(recipe.seed, "prior")

    def run(num_batches: int) -> None:
        for i in range(num_batches):
            images = generate(recipe.model, variables, jax.random.fold_in(key, i), count)
        jax.block_until_ready(images)

    return run
