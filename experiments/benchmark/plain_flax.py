"""The same network as Flax users write it, with `nn.Conv`, `nn.ConvTranspose` and batch norm.

Parameters have the names and shapes of ours, so that one set of variables serves both.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from svae_jax import latents
from svae_jax.model.layers import ACTIVATIONS, Layer, Style
from svae_jax.recipe import Recipe


def of(recipe: Recipe) -> Recipe:
    """The same recipe with plain layers."""
    ours = recipe.model
    plain = ours.clone(
        encoder=Encoder(ours.encoder.layers, ours.encoder.style, ours.posterior),
        decoder=Decoder(ours.decoder.layers, ours.decoder.style),
    )
    return recipe._replace(model=plain)


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
