"""The layers of encoder and decoder: (transposed) convolution → norm → activation."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

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


@dataclasses.dataclass(frozen=True)
class Layer:
    """One (transposed) convolution; stride and padding are per axis."""

    kernel: int
    features: int
    strides: tuple[int, int] = (1, 1)
    paddings: tuple[Padding, Padding] = ("SAME", "SAME")


@dataclasses.dataclass(frozen=True)
class Style:
    """Norm, activation, dtype and convolutions of all layers of a network.

    Raises:
        ValueError: for an unknown name of one of them; the message lists the known ones.
    """

    norm: str = "batch"
    activation: str = "elu"
    dtype: str = "float32"
    convolutions: str = "auto"

    def __post_init__(self):
        """Check the four names."""
        for field, allowed in (
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("dtype", DTYPES),
            ("convolutions", convolutions.KINDS),
        ):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")


class Block(nn.Module):
    """Convolution → norm → activation."""

    layer: Layer
    style: Style
    transposed: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b _h _w d"]:
        """Applies the block; with `train`, batch norm uses and tracks the batch's statistics."""
        norm, dtype = self.style.norm, self.style.dtype
        x = Convolution(self.layer, self.style, self.transposed, use_bias=norm == "none")(x)
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
    """A convolution or transposed convolution; with float32 parameters, in the style's dtype."""

    layer: Layer
    style: Style
    transposed: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _h _w d"]:
        """Apply."""
        layer, dtype = self.layer, self.style.dtype
        shape = (layer.kernel, layer.kernel, x.shape[-1], layer.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        apply = convolutions.conv_transpose if self.transposed else convolutions.conv
        x = apply(
            x.astype(dtype),
            kernel.astype(dtype),
            layer.strides,
            layer.paddings,
            self.style.convolutions,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (layer.features,))
            x = x + bias.astype(dtype)
        return x


def num_groups(features: int, at_most: int = 8) -> int:
    """The largest divisor of `features` that is at most 8: group norm's groups."""
    return next(n for n in range(at_most, 0, -1) if features % n == 0)
