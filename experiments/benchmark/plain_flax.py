"""The same network and training step as Flax users write them, with Flax's own layers.

Parameters have the names and shapes of ours, so that one set of variables serves both.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from experiments.benchmark import workloads
from experiments.benchmark.stopwatch import Contender
from svae_jax import latents
from svae_jax.evaluation import steps
from svae_jax.model.layers import ACTIVATIONS, Layer, Style
from svae_jax.recipe import Recipe, stream
from svae_jax.training import step


def of(recipe: Recipe) -> Recipe:
    """The same recipe with plain layers."""
    ours = recipe.model
    encoder = Encoder(ours.encoder.layers, ours.encoder.style, ours.posterior)
    decoder = Decoder(ours.decoder.layers, ours.decoder.style)
    return recipe._replace(model=ours.clone(encoder=encoder, decoder=decoder))


class Encoder(nn.Module):
    """Images to the numbers that describe a posterior."""

    layers: tuple[Layer, ...]
    style: Style
    posterior: latents.Posterior

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> Float[Array, "b p"]:
        """Emits `posterior.num_params` numbers an image."""
        x = images
        for layer in self.layers:
            x = Block(layer, self.style, nn.Conv)(x, train)
        dense = nn.Dense(self.posterior.num_params, dtype=jnp.float32)
        return dense(x.reshape(len(x), -1)) * self.posterior.output_scale


class Decoder(nn.Module):
    """Latent maps to the means of the pixels."""

    layers: tuple[Layer, ...]
    style: Style

    @nn.compact
    def __call__(self, z: Float[Array, "b h w n"], train: bool) -> Float[Array, "b _h _w c"]:
        """Decodes to images in [-1, 1]."""
        for layer in self.layers[:-1]:
            z = Block(layer, self.style, nn.ConvTranspose)(z, train)
        return jnp.tanh(_convolution(nn.ConvTranspose, self.layers[-1], "float32", bias=True)(z))


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


def training(recipe: Recipe, images: workloads.Images) -> Contender:
    """Training steps, one call for each, with a random batch of images that are on the device."""
    recipe, on_device = of(recipe), jnp.asarray(images)

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


def generation(recipe: Recipe, count: int) -> Contender:
    """Batches of images generated from the prior, without this project's compiler options."""
    generate = jax.jit(steps.generate, static_argnums=(0, 3))
    return workloads.generation(of(recipe), count, generate)
