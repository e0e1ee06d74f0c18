"""The baselines, plain Flax and PyTorch, and the proof that they compute the same."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from experiments.benchmark import workloads
from experiments.benchmark.stopwatch import Contender
from svae_jax import config as configs
from svae_jax.errors import UserError
from svae_jax.evaluation import steps
from svae_jax.model.layers import ACTIVATIONS, Layer, Style
from svae_jax.model.networks import Encoder
from svae_jax.recipe import Recipe, stream
from svae_jax.terminal import say
from svae_jax.training import step

OURS, PLAIN, COMPILED = "svae_jax", "plain Flax", "PyTorch, torch.compile"
NAMES = {"plain": (PLAIN,), "pytorch": ("PyTorch, eager", COMPILED)}  # by the words of --against

# Largest difference of two implementations in float32, relative to an array's norm.
TOLERANCE = 1e-4
# What the baselines are written for. Other differences show in the numbers.
_NEEDED = {"model.norm": "batch", "optimizer.clip_norm": 0.0, "optimizer.ema_decay": 0.0}


def contender(
    name: str, part: str, config_json: str, generated: int = workloads.GENERATED
) -> Contender:
    """The training or generation (`part`) of this project, `OURS`, or of a baseline in `NAMES`."""
    config = configs.from_dict(json.loads(config_json))
    recipe, images = workloads.recipe(config), workloads.noise(config)
    if name in NAMES["pytorch"]:
        from experiments.benchmark import pytorch

        return pytorch.contender(part, recipe, images, generated, compiled=name == COMPILED)
    if name == PLAIN and part == "training":
        return workloads.simple_training(plain_flax(recipe), images)
    if name == PLAIN:
        generate = jax.jit(steps.generate, static_argnums=(0, 3))  # without our compiler options
        return workloads.generation(plain_flax(recipe), generated, generate)
    if part == "training":
        return workloads.training(recipe, images)
    return workloads.generation(recipe, generated)


def plain_flax(recipe: Recipe) -> Recipe:
    """The same recipe as Flax users write it, with Flax's own layers."""
    ours = recipe.model
    plain = ours.clone(encoder=Plain(ours.encoder), decoder=Plain(ours.decoder))
    return recipe._replace(model=plain)


class Plain(nn.Module):
    """An encoder or decoder whose parameters have the names and shapes of ours, and serve both."""

    ours: Any  # an encoder or decoder of `networks`

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _n"], train: bool) -> Float[Array, "b ..."]:
        """Images to the parameters of their posteriors [b, p], or latents to means of pixels."""
        ours = self.ours
        if isinstance(ours, Encoder):
            for layer in ours.layers:
                x = Block(layer, ours.style, nn.Conv)(x, train)
            dense = nn.Dense(ours.posterior.num_params, dtype=jnp.float32)
            return dense(x.reshape(len(x), -1)) * ours.posterior.output_scale
        for layer in ours.layers[:-1]:
            x = Block(layer, ours.style, nn.ConvTranspose)(x, train)
        return jnp.tanh(_convolution(nn.ConvTranspose, ours.layers[-1], "float32", bias=True)(x))


class Block(nn.Module):
    """Convolution → batch norm → activation."""

    layer: Layer
    style: Style
    kind: type[nn.Conv] | type[nn.ConvTranspose]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b _h _w d"]:
        """Applies the block."""
        dtype = self.style.dtype
        x = _convolution(self.kind, self.layer, dtype, bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)
        return ACTIVATIONS[self.style.activation](x)


def _convolution(kind, layer, dtype, bias):
    size, padding = (layer.kernel, layer.kernel), layer.paddings[0]
    options = {"use_bias": bias, "dtype": dtype, "name": "Convolution_0"}
    return kind(layer.features, size, layer.strides, padding, **options)


def check_same(
    config: ml_collections.ConfigDict, against: Sequence[str], num_images: int = 16
) -> dict[str, float]:
    """Compares the numbers of baselines ("plain", "pytorch") with this project's, in float32.

    All get the same random images, noise, parameters and batch statistics.

    Returns:
        For each baseline, the largest difference of a loss, a gradient or the generated images,
        relative to its norm.

    Raises:
        UserError: the difference is more than rounding, or there is no such baseline.
    """
    fields = configs.flatten(config.to_dict())
    for field, value in (_NEEDED | {"latent.width": config.latent.height}).items():
        if fields[field] != value:
            raise UserError(f"baselines need {field}={value!r}, got {fields[field]!r}")
    config = configs.from_dict(config.to_dict())
    config.model.dtype = "float32"  # rounding to bfloat16 would hide a difference
    recipe, rng = workloads.recipe(config), np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        """Kernels of the usual size; scales, biases and statistics near 1."""
        values = rng.standard_normal(x.shape, np.float32)
        return 1 + 0.2 * values if x.ndim < 2 else values * (x.shape[-1] / x.size) ** 0.5

    variables = jax.tree.map(draw, jax.eval_shape(lambda: workloads.initial_variables(recipe)))
    pixels, posterior = workloads.noise(config, num_images), recipe.model.posterior
    # The noise of the first training step; it also serves as latents to decode.
    key = jax.random.fold_in(stream(recipe.seed, "latent"), 0)
    shape = (num_images, posterior.height, posterior.width, posterior.maps)
    noise = np.asarray(jax.random.normal(key, shape))
    differences = {}
    with jax.default_matmul_precision("highest"):
        ours = _numbers(recipe, variables, pixels, noise)
        for name in against:
            if name == "plain":
                expected, found = ours, _numbers(plain_flax(recipe), variables, pixels, noise)
            else:
                from experiments.benchmark import pytorch

                gradients = pytorch.translated(recipe.model, ours["gradients"])
                expected = ours | {"gradients": gradients}
                try:
                    found = pytorch.numbers(pytorch.make(recipe, variables), pixels, noise)
                except (RuntimeError, ValueError) as error:
                    raise UserError(
                        f"PyTorch lacks a layer; use --against=plain: {error}"
                    ) from None
            differences[name] = largest_difference(name, expected, found)
    return differences


def _numbers(recipe, variables, pixels, z) -> dict[str, Any]:
    """Losses and gradients of the training step, and images generated from z."""
    keeps_gradients = optax.GradientTransformation(
        lambda params: params,
        lambda gradients, *_: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    recipe = recipe._replace(optimizer=keeps_gradients)
    images = jax.jit(functools.partial(recipe.model.apply, method="decode"))(variables, z)
    params, health = variables["params"], step.Health(*map(jnp.int32, (0, -1, 0)))
    state = step.TrainState(jnp.int32(0), params, variables["batch_stats"], params, None, health)
    state, losses = jax.jit(functools.partial(step.train_step, recipe))(state, pixels)
    numbers = {name: losses[name] for name in ("loss", "reconstruction", "kl")}
    return jax.device_get(numbers | {"images": images, "gradients": state.opt_state})


def largest_difference(name: str, ours: PyTree, theirs: PyTree) -> float:
    """The largest difference of two implementations' numbers, relative to an array's norm.

    Raises:
        UserError: it is above `TOLERANCE`.
    """
    errors = jax.tree.leaves_with_path(jax.tree.map(_difference, ours, theirs))
    path, worst = max(errors, key=lambda item: np.nan_to_num(item[1], nan=np.inf))
    if not worst <= TOLERANCE:
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        raise UserError(
            f"{name} does not compute the same, so leave it out of --against: {leaf} differs by "
            f"{worst:.1e} of its norm"
        )
    say(f"{name} computes the same losses, gradients and images; largest difference {worst:.0e}")
    return worst


def _difference(ours: Any, theirs: Any) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs)) / max(float(np.linalg.norm(ours)), 1e-30)
