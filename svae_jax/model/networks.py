"""Encoder and decoder: stacks of (transposed) convolution → norm → activation.

A stack is written as text, one word a layer, for instance the CelebA encoder

    5x5/32/s2 5x5/64/s2 5x5/128/s2/valid

is three 5×5 convolutions to 32, 64 and 128 features, each of stride 2, the last without padding.
In a decoder the features of the last layer are the word `image`: as many as the likelihood takes,
which for most likelihoods are the channels of the images.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from svae_jax import latents
from svae_jax.likelihoods import Likelihood
from svae_jax.model import convolutions, norms
from svae_jax.model.convolutions import Padding


@jax.custom_jvp
def elu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x where it is positive, exp(x) − 1 elsewhere.

    The derivative is computed from the result, y + 1 below zero, so that only y is kept.
    """
    return jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0)))


@elu.defjvp
def _elu_jvp(primals, tangents):
    y = elu(*primals)
    return y, tangents[0] * jnp.where(y > 0, 1, y + 1)


NORMS = ("batch", "group", "none")
ACTIVATIONS: dict[str, Callable] = {
    "elu": elu,
    "gelu": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}
DTYPES = ("float32", "bfloat16")

# A decoder's first two 3x3 layers take maps of size d to this size: (stride, padding) of each.
GROWN_SIZE = 8
_GROWTH: dict[int, tuple[tuple[int, Padding], tuple[int, Padding]]] = {
    2: ((2, "SAME"), (2, "SAME")),
    3: ((2, "SAME"), (1, "VALID")),
    4: ((2, "SAME"), (1, "SAME")),
    6: ((1, "SAME"), (1, "VALID")),
    8: ((1, "SAME"), (1, "SAME")),
}
# The layer in front of a vector's decoder takes a map of size 1 to this size.
_VECTOR_START = 3


@dataclasses.dataclass(frozen=True)
class Layer:
    """One (transposed) convolution; stride and padding are per axis."""

    kernel: int
    features: int
    strides: tuple[int, int] = (1, 1)
    paddings: tuple[Padding, Padding] = ("SAME", "SAME")


@dataclasses.dataclass(frozen=True)
class Style:
    """Norm, activation and dtype of all layers of a network.

    Raises:
        ValueError: for an unknown norm, activation or dtype; the message lists the known ones.
    """

    norm: str = "batch"
    activation: str = "elu"
    dtype: str = "float32"

    def __post_init__(self):
        """Check the three names."""
        for field, allowed in (("norm", NORMS), ("activation", ACTIVATIONS), ("dtype", DTYPES)):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")


_WORD = re.compile(r"(\d+)x(\d+)/(\d+|image)(?:/s(\d+))?(/valid)?")


def parse(stack: str, num_outputs: int | None = None) -> tuple[Layer, ...]:
    """Read a stack of layers from its text (see the module's docstring).

    Args:
        stack: words such as `5x5/32/s2/valid`; stride 1 and SAME padding where none is given.
        num_outputs: what `image` stands for; None in an encoder, where the word is refused.

    Raises:
        ValueError: an empty stack, or a word that is not a layer.
    """
    if not stack.split():
        raise ValueError("a stack needs at least one layer, such as '5x5/32/s2'")
    return tuple(_parse_word(word, num_outputs) for word in stack.split())


def _parse_word(word: str, num_outputs: int | None) -> Layer:
    match = _WORD.fullmatch(word)
    if match is None or match[1] != match[2]:
        raise ValueError(
            f"{word!r} is no layer: write KxK/FEATURES, then /sSTRIDE and /valid where wanted, "
            "such as 5x5/32/s2/valid"
        )
    if match[3] != "image":
        features = int(match[3])
    elif num_outputs is not None:
        features = num_outputs
    else:
        raise ValueError(f"{word!r}: only a decoder's last layer makes an image")
    kernel, stride = int(match[1]), int(match[4] or 1)
    if min(kernel, features, stride) < 1:
        raise ValueError(f"{word!r}: kernel, features and stride must be at least 1")
    padding: Padding = "VALID" if match[5] else "SAME"
    return Layer(kernel, features, (stride, stride), (padding, padding))


def check_latent_size(height: int, width: int) -> None:
    """Checks that a decoder's first two layers take maps of this size to 8 × 8.

    Raises:
        ValueError: naming the side, and listing the sizes that there are.
    """
    for axis, size in (("height", height), ("width", width)):
        if size not in _GROWTH:
            sizes = ", ".join(map(str, _GROWTH))
            raise ValueError(f"{axis} must be one of {sizes} for a decoder, got {axis}={size}")


def decoder_layers(
    stack: str,
    *,
    height: int,
    width: int,
    image_size: int,
    num_outputs: int,
) -> tuple[Layer, ...]:
    """Fits a decoder's stack to maps of height × width.

    The first two layers are 3x3 and take the maps to 8 × 8; their strides and padding follow from
    height and width, so that the weights do not depend on them. The others lead from there to the
    image.

    Raises:
        ValueError: where the maps have another size than 2, 3, 4, 6 or 8, where the stack does not
            begin with two plain 3x3 layers, does not end in `image`, or misses the image's size.
    """
    layers = parse(stack, num_outputs)
    if not stack.split()[-1].split("/")[1] == "image" or stack.count("image") > 1:
        raise ValueError(
            f"the last layer, and no other, must have the features 'image', got {stack!r}"
        )
    if len(layers) < 3 or any(layer != Layer(3, layer.features) for layer in layers[:2]):
        raise ValueError(
            "a decoder begins with two layers 3x3/FEATURES without stride or padding "
            f"(both follow from the latent's size) and has one more at least, got {stack!r}"
        )
    check_latent_size(height, width)
    grown = tuple(
        dataclasses.replace(
            layer,
            strides=(_GROWTH[height][i][0], _GROWTH[width][i][0]),
            paddings=(_GROWTH[height][i][1], _GROWTH[width][i][1]),
        )
        for i, layer in enumerate(layers[:2])
    )
    size = GROWN_SIZE
    for layer in layers[2:]:
        size = convolutions.transposed_output_size(
            size, layer.kernel, layer.strides[0], layer.paddings[0]
        )
    if size != image_size:
        raise ValueError(f"the decoder {stack!r} makes images of size {size}, not {image_size}")
    return grown + layers[2:]


def vector_decoder_layers(
    stack: str,
    *,
    maps: int,
    parity_maps: int,
    image_size: int,
    num_outputs: int,
    style: Style,
) -> tuple[Layer, ...]:
    """The decoder of a vector latent: one more layer in front, 3x3 VALID, from 1×1 to 3×3.

    Its width is solved so that this decoder has as many parameters, within 1%, as the decoder of
    spatial latents of `parity_maps` maps has with the same stack.

    Raises:
        ValueError: as `decoder_layers`, and where no width comes within 1%.
    """
    spatial = decoder_layers(
        stack,
        height=_VECTOR_START,
        width=_VECTOR_START,
        image_size=image_size,
        num_outputs=num_outputs,
    )

    front = Layer(_VECTOR_START, 1, paddings=("VALID", "VALID"))
    target = num_decoder_params(spatial, parity_maps, style)
    layers = fitted_width((front, *spatial), maps, style, target)
    reached = num_decoder_params(layers, maps, style)
    if abs(reached - target) > 0.01 * target:
        raise ValueError(
            f"no width of the vector's first layer comes within 1% of the {target} parameters "
            f"that parity_maps={parity_maps} maps have (nearest: {reached}); take more parity_maps "
            "or fewer maps"
        )
    return layers


def fitted_width(
    layers: Sequence[Layer], maps: int, style: Style, target: int
) -> tuple[Layer, ...]:
    """The layers, the first as wide as brings `Decoder` nearest to `target` parameters."""

    def of_width(features: int) -> tuple[Layer, ...]:
        return (dataclasses.replace(layers[0], features=features), *layers[1:])

    one, two = (num_decoder_params(of_width(width), maps, style) for width in (1, 2))
    # The number is affine in the width.
    return of_width(max(1, round(1 + (target - one) / (two - one))))


def matching_stack(stack: str, *, maps: int, like: int) -> str:
    """The stack with a first layer of such a width that both decoders have nearly the same size.

    Args:
        stack: of a decoder of `like` maps.
        maps: the number of maps that the returned stack decodes.
        like: the number of maps that `stack` decodes.
    """
    layers, style = parse(stack, num_outputs=3), Style()
    fitted = fitted_width(layers, maps, style, num_decoder_params(layers, like, style))
    first, *others = stack.split()
    kernel, _, *rest = first.split("/")
    return " ".join(["/".join([kernel, str(fitted[0].features), *rest]), *others])


def num_decoder_params(layers: Sequence[Layer], in_features: int, style: Style) -> int:
    """Number of weights that `Decoder(layers, style)` has for latents of `in_features` maps."""
    total = 0
    for i, layer in enumerate(layers):
        total += layer.kernel**2 * in_features * layer.features
        bias_only = i == len(layers) - 1 or style.norm == "none"
        total += layer.features * (1 if bias_only else 2)  # bias, or the norm's scale and bias
        in_features = layer.features
    return total


class Encoder(nn.Module):
    """Images to the numbers that describe a posterior.

    Attributes:
        layers: the convolutions.
        posterior: how many numbers the last, dense layer emits, and its initial bias.
        style: norm, activation and dtype.
    """

    layers: tuple[Layer, ...]
    posterior: latents.Posterior
    style: Style

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> Float[Array, "b p"]:
        """Emits `posterior.num_params` numbers an image, in float32."""
        x = images
        for layer in self.layers:
            x = Block(layer, self.style, transposed=False)(x, train)
        x = x.reshape(x.shape[0], -1)
        scale = self.posterior.output_scale
        dense = nn.Dense(
            self.posterior.num_params,
            dtype=jnp.float32,  # in bfloat16, means would be rounded to 8 bits
            # A tenth of the usual size, so that every posterior starts near its initial bias. At
            # the usual size a low-rank mean starts as noise times noise.
            kernel_init=nn.initializers.variance_scaling(0.1**2, "fan_in", "truncated_normal"),
            bias_init=lambda key, *_: self.posterior.initial_bias(key) / scale,
        )
        return dense(x) * scale


class Decoder(nn.Module):
    """Latent maps to the outputs that a likelihood takes, such as the means of the pixels.

    Attributes:
        layers: the transposed convolutions.
        likelihood: the map on what the last layer emits.
        style: norm, activation and dtype.
    """

    layers: tuple[Layer, ...]
    likelihood: Likelihood
    style: Style

    @nn.compact
    def __call__(self, z: Float[Array, "b h w n"], train: bool) -> Float[Array, "b _h _w k"]:
        """Decodes to `likelihood.num_outputs` channels in float32; the last layer has no norm."""
        x = z
        for layer in self.layers[:-1]:
            x = Block(layer, self.style, transposed=True)(x, train)
        # In float32: rounding to bfloat16 would count as error in the likelihood.
        x = Convolution(self.layers[-1], "float32", transposed=True, use_bias=True)(x)
        return self.likelihood.activate(x)


class Constant(nn.Module):
    """In place of an encoder: the same parameters of the posterior for all images."""

    posterior: latents.Posterior

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> Float[Array, "b p"]:
        """Emits `posterior.num_params` learned numbers for each image."""
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


class Block(nn.Module):
    """Convolution → norm → activation."""

    layer: Layer
    style: Style
    transposed: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b _h _w d"]:
        """Applies the block; with `train`, batch norm uses and tracks the batch's statistics."""
        norm, dtype = self.style.norm, self.style.dtype
        x = Convolution(self.layer, dtype, self.transposed, use_bias=norm == "none")(x)
        if norm == "batch":
            x = BatchNorm(dtype)(x, train)
        elif norm == "group":
            x = nn.GroupNorm(num_groups=num_groups(self.layer.features), dtype=dtype)(x)
        return ACTIVATIONS[self.style.activation](x)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with `nn.BatchNorm`'s variables and numbers.

    On a GPU it takes fewer kernels (see `norms`).
    """

    dtype: str
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        """Normalises by the batch's statistics and tracks them, or by the tracked ones."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        if not train:
            return norms.normalize(x, mean.value, variance.value, scale, bias, self.epsilon).astype(
                self.dtype
            )
        y, *statistics = norms.batch_norm(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for tracked, value in zip((mean, variance), statistics, strict=True):
                tracked.value = self.momentum * tracked.value + (1 - self.momentum) * value
        return y.astype(self.dtype)


class Convolution(nn.Module):
    """A convolution or transposed convolution, parameters in float32, computed in `dtype`."""

    layer: Layer
    dtype: str
    transposed: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _h _w d"]:
        """Apply."""
        layer = self.layer
        shape = (layer.kernel, layer.kernel, x.shape[-1], layer.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        apply = convolutions.conv_transpose if self.transposed else convolutions.conv
        x = apply(x.astype(self.dtype), kernel.astype(self.dtype), layer.strides, layer.paddings)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (layer.features,))
            x = x + bias.astype(self.dtype)
        return x


def num_groups(features: int, at_most: int = 8) -> int:
    """The largest divisor of `features` that is at most 8: group norm's groups."""
    return next(n for n in range(at_most, 0, -1) if features % n == 0)


def encoder_size(layers: Sequence[Layer], image_size: int) -> int:
    """Length of the encoder's last feature map.

    Raises:
        ValueError: where a layer leaves nothing of it.
    """
    size = image_size
    for layer in layers:
        before = size
        size = convolutions.output_size(size, layer.kernel, layer.strides[0], layer.paddings[0])
        if size < 1:
            raise ValueError(
                f"a {layer.kernel}x{layer.kernel} layer leaves nothing of {before} pixels"
            )
    return size


def num_params(params: PyTree) -> int:
    """The number of weights in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
