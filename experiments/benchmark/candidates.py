"""What the timing experiments time, and the proof that rivals compute the same."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import PyTree, UInt8

from experiments.benchmark import plain_flax
from experiments.benchmark.stopwatch import Candidate, say
from svae_jax import config as configs
from svae_jax.devices import compiler, sharding
from svae_jax.errors import UserError
from svae_jax.evaluation import steps
from svae_jax.recipe import Recipe, stream
from svae_jax.training import feed, step
from svae_jax.training.metrics import TrainMetrics

NUM_IMAGES = 10_000  # trained on, where their number does not matter
OURS = "svae_jax"
PLAIN, EAGER, COMPILED = "plain Flax", "PyTorch, eager", "PyTorch, torch.compile"
RIVALS = {"plain": (PLAIN,), "pytorch": (EAGER, COMPILED)}  # and what is timed of each

# Largest difference of two implementations in float32, relative to the array's norm.
_TOLERANCE = 1e-4

Images = UInt8[np.ndarray, "n h w c"]


def generated_images(count: int, config: ml_collections.ConfigDict) -> Images:
    """Noise in the shape of the configuration's images."""
    size, channels = config.dataset.image_size, config.dataset.channels
    shape = (count, size, size, channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def recipe_of(config: ml_collections.ConfigDict, num_images: int = NUM_IMAGES) -> Recipe:
    """What a run on so many images would train."""
    return configs.recipe(config, configs.num_steps(config, num_images))


def _initial(recipe: Recipe) -> step.TrainState:
    return jax.jit(lambda: step.init_state(recipe))()


def training(recipe: Recipe, images: Images, resident_share: float = 1.0) -> Candidate:
    """The updates of a run: gather a batch, train, add up the metrics."""
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
            jax.block_until_ready(before)  # as `train` does
            at += made
        jax.block_until_ready(state)

    return run


def bare_training(recipe: Recipe, images: Images) -> Candidate:
    """Nothing but the compiled training step, always on the same batch."""
    update = compiler.jit(functools.partial(step.train_step, recipe), donate_argnums=0)
    state = _initial(recipe)
    pixels = jnp.asarray(images[: recipe.batch_size])

    def run(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps):
            state, _ = update(state, pixels)
        jax.block_until_ready(state)

    return run


def generation(recipe: Recipe, batch_size: int) -> Candidate:
    """Batches of images generated from the prior."""
    variables = step.evaluated_variables(_initial(recipe))
    key = stream(recipe.seed, "prior")

    def run(num_batches: int) -> None:
        for i in range(num_batches):
            images = steps.generate(recipe.model, variables, jax.random.fold_in(key, i), batch_size)
        jax.block_until_ready(images)

    return run


def rival_training(title: str, fields: Mapping[str, Any]) -> Candidate:
    """The same updates as `training` makes, by a rival, of the configuration with these fields."""
    config = configs.from_dict(fields)
    recipe, images = recipe_of(config), generated_images(NUM_IMAGES, config)
    if title == PLAIN:
        return plain_flax.training(recipe, images)
    from experiments.benchmark import pytorch

    network, learning_rate = _network(recipe), config.optimizer.learning_rate
    return pytorch.training(network, images, config.batch_size, learning_rate, title == COMPILED)


def rival_generation(title: str, fields: Mapping[str, Any], batch_size: int) -> Candidate:
    """The same as `generation`, by a rival, of the configuration with these fields."""
    recipe = recipe_of(configs.from_dict(fields))
    if title == PLAIN:
        return plain_flax.generation(recipe, batch_size)
    from experiments.benchmark import pytorch

    return pytorch.generation(_network(recipe), batch_size, title == COMPILED)


def _network(recipe: Recipe):
    from experiments.benchmark import pytorch

    state = _initial(recipe)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    pytorch.allow_tf32(True)
    return pytorch.make(recipe.model, recipe.image_shape, variables)


def installed(rivals: Sequence[str]) -> list[str]:
    """Those rivals that can be compared; says which cannot."""
    if "pytorch" in rivals and importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed, and left out; pip install -e '.[bench]' installs it")
        return [name for name in rivals if name != "pytorch"]
    return list(rivals)


def check_same(
    config: ml_collections.ConfigDict, rivals: Sequence[str], num_images: int = 16
) -> dict[str, float]:
    """Compare what rivals compute with what we do, in float32.

    All get the same images, noise and parameters: ours as training starts, moved a little, so that
    no bias is 0.

    Returns:
        For each rival, the largest difference of a loss, a gradient or the generated images,
        relative to its norm.

    Raises:
        UserError: they differ by more than rounding, or the rival has no such network.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    config.model.dtype = "float32"  # in which implementations differ little
    recipe = recipe_of(config)
    state = _initial(recipe)
    variables = _moved({"params": state.params, "batch_stats": state.batch_stats})
    pixels = generated_images(num_images, config)
    posterior = recipe.model.posterior
    shape = (num_images, posterior.height, posterior.width, posterior.maps)
    z = np.asarray(jax.random.normal(jax.random.key(1), shape))
    with jax.default_matmul_precision("highest"):
        ours = _numbers(recipe, state, variables, pixels, z)
        worst = {}
        for rival in rivals:
            if rival == "plain":
                pair = ours, _numbers(plain_flax.of(recipe), state, variables, pixels, z)
            else:
                pair = _pytorch_pair(config, recipe, variables, ours, pixels, z)
            worst[rival] = largest_difference(rival, *pair)
    return worst


def _numbers(
    recipe: Recipe, state: step.TrainState, variables: PyTree, pixels: Images, z: np.ndarray
) -> tuple[dict[str, Any], PyTree]:
    """Losses of the training step and images generated from z; the gradients."""
    keeps_gradients = optax.GradientTransformation(
        lambda params: params,
        lambda gradients, _, __: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    recipe = recipe._replace(optimizer=keeps_gradients, ema_decay=0.0)
    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    state = state._replace(**variables, opt_state=zeros, ema=None)
    state, losses = jax.jit(functools.partial(step.train_step, recipe))(state, pixels)
    decode = jax.jit(functools.partial(recipe.model.apply, method="decode"))
    scalars = {name: losses[name] for name in ("loss", "reconstruction", "kl")}
    generated = {"generated images": decode(variables, z)}
    return jax.device_get((scalars | generated, state.opt_state))


def _pytorch_pair(config, recipe, variables, ours, pixels, z):
    """Our numbers with gradients as PyTorch names them, and PyTorch's."""
    from experiments.benchmark import pytorch

    pytorch.check(config)
    pytorch.allow_tf32(False)
    network = pytorch.make(recipe.model, recipe.image_shape, variables)
    # The noise of the training step's first update.
    key = jax.random.fold_in(stream(recipe.seed, "latent"), 0)
    noise = np.asarray(jax.random.normal(key, z.shape))
    scalars, gradients = ours
    translated = pytorch.translated(recipe.model, gradients, {})
    return (scalars, translated), pytorch.numbers(network, pixels, noise, z)


def largest_difference(rival: str, ours: PyTree, theirs: PyTree) -> float:
    """The largest difference of two (losses and images, gradients), relative to a leaf's norm.

    Raises:
        UserError: it is above what rounding makes.
    """
    errors = jax.tree.leaves_with_path(jax.tree.map(_difference, ours, theirs))
    path, worst = max(errors, key=lambda item: np.nan_to_num(item[1], nan=np.inf))
    if not worst <= _TOLERANCE:
        name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        raise UserError(
            f"{rival} does not compute the same, and is not timed: {name} differs by {worst:.1e} "
            "of its norm"
        )
    say(f"{rival} computes the same (losses, gradients, images; difference {worst:.0e})")
    return worst


def _difference(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    # Where both are 0, they do not differ.
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(ours), 1e-30))


def _moved(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), tree)
