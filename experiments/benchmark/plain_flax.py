"""The same network and training as Flax users write them: `nn.Conv`, `nn.ConvTranspose`, `jit`.

Parameters have the names and shapes of ours, so that one set of variables serves both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from experiments.benchmark.stopwatch import Candidate
from svae_jax.errors import UserError
from svae_jax.model import networks
from svae_jax.recipe import Recipe, stream
from svae_jax.training import step
from svae_jax.training.metrics import TrainMetrics


def of(recipe: Recipe) -> Recipe:
    """The same recipe with plain layers.

    Raises:
        UserError: the stride or the padding of a layer differs between height and width.
    """
    ours = recipe.model
    for layer in (*ours.encoder.layers, *ours.decoder.layers):
        if len(set(layer.paddings)) > 1 or len(set(layer.strides)) > 1:
            raise UserError("latent.height and latent.width must be equal, to compare")
    encoder, decoder = ours.encoder, ours.decoder
    plain = ours.clone(
        encoder=Encoder(encoder.layers, ours.posterior.num_params, encoder.style),
        decoder=Decoder(decoder.layers, decoder.style),
    )
    return recipe._replace(model=plain)


def training(recipe: Recipe, images: UInt8[np.ndarray, "n h w c"]) -> Candidate:
    """Updates with batches of images that are on the device, one call each."""
    recipe = of(recipe)
    on_device = jnp.asarray(images)
    permutation = jax.jit(lambda epoch: step.epoch_permutation(recipe.seed, epoch, len(images)))
    steps_per_epoch = len(images) // recipe.batch_size

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(state, totals, images, order):
        indices = step.batch_indices(order, state.step, recipe.batch_size)
        state, scalars = step.train_step(recipe, state, images[indices])
        return state, totals.merge(TrainMetrics.single_from_model_output(**scalars))

    state, totals = jax.jit(lambda: (step.init_state(recipe), TrainMetrics.empty()))()
    at, order = 0, permutation(0)

    def run(num_steps: int) -> None:
        nonlocal state, totals, at, order
        for _ in range(num_steps):
            if at % steps_per_epoch == 0:
                order = permutation(at // steps_per_epoch)
            state, totals = update(state, totals, on_device, order)
            at += 1
        jax.block_until_ready(state)

    return run


def generation(recipe: Recipe, batch_size: int) -> Candidate:
    """Batches of images generated from the prior."""
    network = of(recipe).model
    state = jax.jit(lambda: step.init_state(recipe))()
    key = stream(recipe.seed, "prior")

    @jax.jit
    def generate(variables, key):
        return network.apply(variables, network.sample_prior(key, batch_size), method="decode")

    def run(num_batches: int) -> None:
        for i in range(num_batches):
            images = generate(step.evaluated_variables(state), jax.random.fold_in(key, i))
        jax.block_until_ready(images)

    return run


class Encoder(nn.Module):
    """Images to the numbers that describe a posterior."""

    layers: tuple[networks.Layer, ...]
    num_outputs: int
    style: networks.Style

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> Float[Array, "b p"]:
        """Emit `num_outputs` numbers an image."""
        x = images
        for layer in self.layers:
            x = Block(layer, self.style, nn.Conv)(x, train)
        return nn.Dense(self.num_outputs, dtype=jnp.float32)(x.reshape(len(x), -1))


class Decoder(nn.Module):
    """Latent maps to the means of the pixels."""

    layers: tuple[networks.Layer, ...]
    style: networks.Style

    @nn.compact
    def __call__(self, z: Float[Array, "b h w n"], train: bool) -> Float[Array, "b _h _w c"]:
        """Decode to images in [-1, 1]."""
        x = z
        for layer in self.layers[:-1]:
            x = Block(layer, self.style, nn.ConvTranspose)(x, train)
        return jnp.tanh(_convolution(nn.ConvTranspose, self.layers[-1], "float32", True)(x))


class Block(nn.Module):
    """Convolution → norm → activation."""

    layer: networks.Layer
    style: networks.Style
    kind: type[nn.Conv] | type[nn.ConvTranspose]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b _h _w d"]:
        """Apply."""
        norm, dtype = self.style.norm, self.style.dtype
        x = _convolution(self.kind, self.layer, dtype, norm == "none")(x)
        if norm == "batch":
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)
        elif norm == "group":
            x = nn.GroupNorm(networks.num_groups(self.layer.features), dtype=dtype)(x)
        return networks.ACTIVATIONS[self.style.activation](x)


def _convolution(kind, layer, dtype, use_bias):
    return kind(
        layer.features,
        (layer.kernel, layer.kernel),
        layer.strides,
        layer.paddings[0],
        use_bias=use_bias,
        dtype=dtype,
        name="Convolution_0",
    )
