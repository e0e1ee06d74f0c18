"""Encoder and decoder."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from svae_jax import latents
from svae_jax.likelihoods import Likelihood
from svae_jax.model.layers import Block, Convolution, Layer, Style


class Encoder(nn.Module):
    """Images to the parameters of a posterior.

    Attributes:
        layers: the convolutions.
        posterior: gives the number of parameters and their initial bias.
        style: of all layers.
        head: "dense", one layer from all features to all parameters; or "convolutional",
            see `Head`.
    """

    layers: tuple[Layer, ...]
    posterior: latents.Posterior
    style: Style
    head: str = "dense"

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> Float[Array, "b p"]:
        """The parameters of the posterior of each image, in float32."""
        x = images
        for layer in self.layers:
            x = Block(layer, self.style, transposed=False)(x, train)
        if self.head == "convolutional":
            return Head(self.posterior)(x)
        x = x.reshape(x.shape[0], -1)
        scale = self.posterior.output_scale
        dense = nn.Dense(
            self.posterior.num_params,
            dtype=jnp.float32,  # in bfloat16, means would be rounded to 8 bits
            kernel_init=_small(),
            bias_init=lambda key, *_: self.posterior.initial_bias(key) / scale,
        )
        return dense(x) * scale


class Head(nn.Module):
    """Features to the parameters of a posterior, cell by cell.

    Features are averaged over each latent cell. Arrays of the posterior with an entry a cell are a
    1x1 convolution of these; those with an entry a row (a column) come from their means over the
    columns (rows), and all others from the mean over the image (`Posterior.axes`). The weights are
    shared by all cells; the bias is not.

    Attributes:
        posterior: the arrays and their axes.
    """

    posterior: latents.Posterior

    @nn.compact
    def __call__(self, features: Float[Array, "b y x f"]) -> Float[Array, "b p"]:
        """The parameters of the posterior of each image, in float32."""
        q = self.posterior
        scale = q.output_scale
        bias = self.param("bias", lambda key: q.initial_bias(key) / scale)
        cells = _averaged(_averaged(features.astype(jnp.float32), 1, q.height), 2, q.width)
        emitted = []
        for name, shape in q.shapes.items():
            axes = q.axes.get(name, "")
            x = cells.mean([i for i, axis in ((1, "h"), (2, "w")) if axis not in axes])
            size = math.prod(shape[len(axes) :])
            x = nn.Dense(size, use_bias=False, kernel_init=_small(), name=name)(x)
            emitted.append(x.reshape(len(x), -1))
        return (jnp.concatenate(emitted, axis=-1) + bias) * scale


def _averaged(x: Float[Array, "b y x f"], axis: int, count: int) -> Float[Array, "b _y _x f"]:
    """Means over `count` equal parts of an axis; entries on a border count for both parts."""
    size = x.shape[axis]
    if size == count:
        return x
    edges = np.arange(count + 1) * size / count
    place = np.arange(size)
    shares = np.minimum(place + 1, edges[1:, None]) - np.maximum(place, edges[:-1, None])
    matrix = (shares.clip(0) * count / size).astype(np.float32)
    return jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1), precision="highest"), -1, axis)


def _small() -> nn.initializers.Initializer:
    """A tenth of the usual size, so that every posterior starts near its initial bias.

    At the usual size a low-rank mean starts as noise times noise.
    """
    return nn.initializers.variance_scaling(0.1**2, "fan_in", "truncated_normal")


class Decoder(nn.Module):
    """Latent maps to the outputs that a likelihood takes, such as the means of the pixels.

    Attributes:
        layers: the transposed convolutions.
        likelihood: the map on what the last layer emits.
        style: of all layers.
    """

    layers: tuple[Layer, ...]
    likelihood: Likelihood
    style: Style

    @nn.compact
    def __call__(self, z: Float[Array, "b h w n"], train: bool) -> Float[Array, "b _h _w k"]:
        """Decodes to `likelihood.num_outputs` channels in float32; the last layer has no norm.

        What the layers make beyond the image is cropped.
        """
        x = z
        for layer in self.layers[:-1]:
            x = Block(layer, self.style, transposed=True)(x, train)
        # In float32: rounding to bfloat16 would count as error in the likelihood.
        style = dataclasses.replace(self.style, dtype="float32")
        x = Convolution(self.layers[-1], style, transposed=True, use_bias=True)(x)
        return self.likelihood.activate(_cropped(x, self.likelihood.image_shape[:2]))


def _cropped(x: Float[Array, "b y x k"], size: tuple[int, int]) -> Float[Array, "b h w k"]:
    """The centre of this size."""
    top, left = ((n - m) // 2 for n, m in zip(x.shape[1:3], size, strict=True))
    return x[:, top : top + size[0], left : left + size[1]]


class Constant(nn.Module):
    """In place of an encoder: the same parameters of the posterior for all images."""

    posterior: latents.Posterior

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> Float[Array, "b p"]:
        """The same learned parameters of a posterior for each image."""
        del train
        scale = self.posterior.output_scale
        start = self.posterior.initial_bias
        bias = self.param("bias", lambda key: start(key) / scale)
        return jnp.broadcast_to(bias * scale, (len(images), self.posterior.num_params))


class Zero(nn.Module):
    """In place of a decoder: zeros of the image's shape."""

    likelihood: Likelihood

    def __call__(self, z: Float[Array, "b h w n"], train: bool) -> Float[Array, "b _h _w k"]:
        """Zeros, for every latent."""
        del train
        height, width, _ = self.likelihood.image_shape
        return jnp.zeros((len(z), height, width, self.likelihood.num_outputs))


def num_params(params: PyTree) -> int:
    """The number of weights in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
