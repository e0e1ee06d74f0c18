"""Transposed convolution with gradients that are plain convolutions.

A transposed convolution y = conv_transpose(x, w) is the adjoint, in x, of a convolution C_k with
the kernel k = flip(w): spatially reversed, channels exchanged. Hence for a cotangent g of y

    dx = C_k(g)                                   (one convolution)
    dw = flip(d/dk <x, C_k(g)>)                   (the kernel gradient of that convolution)

Autodiff instead differentiates a convolution dilated on its left side and asks for one dilated on
both sides, which XLA runs 6 to 18 times slower on CPU. The values are the same to rounding.

Forward, large ones are computed on CPU as a convolution that makes blocks of pixels (`_phases`).

Forward-mode differentiation raises JAX's own TypeError, as for every `jax.custom_vjp`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# From this size on, a CPU computes a transposed convolution faster by phases (up to 4 times).
_PHASES_FROM = 16

Padding = Literal["SAME", "VALID"]


def output_size(size: int, kernel: int, stride: int, padding: Padding) -> int:
    """Length of one axis after a convolution; below 1 where nothing is left."""
    if padding == "SAME":
        return -(-size // stride)
    return (size - kernel) // stride + 1


def transposed_output_size(size: int, kernel: int, stride: int, padding: Padding) -> int:
    """Length of one axis after a transposed convolution."""
    return size * stride + (max(kernel - stride, 0) if padding == "VALID" else 0)


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    strides: tuple[int, int],
    paddings: tuple[Padding, Padding],
) -> Float[Array, "b _ _ d"]:
    """Convolution, channels last, with stride and padding given per axis."""
    pads = [
        _pads(*axis) for axis in zip(x.shape[1:3], kernel.shape[:2], strides, paddings, strict=True)
    ]
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_transpose(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    strides: tuple[int, int],
    paddings: tuple[Padding, Padding],
) -> Float[Array, "b _ _ d"]:
    """Transposed convolution, channels last, as `jax.lax.conv_transpose` defines it.

    Args:
        x: input images.
        kernel: height, width, input features, output features.
        strides: how many times each axis grows.
        paddings: "SAME" (size · stride) or "VALID" (plus what the kernel overhangs), for each axis.
    """
    native = functools.partial(_native, strides=strides, paddings=paddings)
    if min(strides) < 2 or min(x.shape[1:3]) < _PHASES_FROM:
        return native(x, kernel)
    phases = functools.partial(_phases, strides=strides, paddings=paddings)
    return jax.lax.platform_dependent(x, kernel, cpu=phases, default=native)


def _native(x, kernel, strides, paddings):
    """As a convolution of the input with zeros between its pixels."""
    pads = [
        _transposed_pads(*axis) for axis in zip(kernel.shape[:2], strides, paddings, strict=True)
    ]
    return lax.conv_transpose(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _phases(x, kernel, strides, paddings):
    """As one convolution without zeros, whose features are the output's pixels in blocks.

    Along an axis, the output at o = s·q + p sums w[t] x[q + (p + t − low)/s] over those t for which
    the division is even. For each phase p these are a few taps of the kernel; the convolution with
    all s phases side by side makes s outputs for each q, and interleaving them gives y.
    """
    (rows, row_start), (cols, col_start) = (
        _taps(*axis) for axis in zip(kernel.shape[:2], strides, paddings, strict=True)
    )
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))  # where a phase has no tap: zero
    by_phase = jnp.transpose(padded[rows][:, :, cols], (1, 3, 4, 0, 2, 5))  # j i c p q d
    sizes = [
        transposed_output_size(*axis)
        for axis in zip(x.shape[1:3], kernel.shape[:2], strides, paddings, strict=True)
    ]
    blocks = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    pads = [
        (-start, count - size + start + taps.shape[1] - 1)
        for start, count, size, taps in zip(
            (row_start, col_start), blocks, x.shape[1:3], (rows, cols), strict=True
        )
    ]
    y = lax.conv_general_dilated(
        x,
        by_phase.reshape(*by_phase.shape[:3], -1),
        (1, 1),
        pads,
        dimension_numbers=_LAYOUT,
    )
    y = y.reshape(len(x), *blocks, *strides, -1).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(len(x), blocks[0] * strides[0], blocks[1] * strides[1], -1)
    return y[:, : sizes[0], : sizes[1]]


def _taps(kernel: int, stride: int, padding: Padding) -> tuple[np.ndarray, int]:
    """Which tap [phase, j] of a kernel meets input q + start + j, `kernel` for none; and start."""
    low, _ = _transposed_pads(kernel, stride, padding)
    meets = {
        (phase, (phase + tap - low) // stride): tap
        for phase in range(stride)
        for tap in range(kernel)
        if (phase + tap - low) % stride == 0
    }
    offsets = [offset for _, offset in meets]
    table = np.full((stride, max(offsets) - min(offsets) + 1), kernel)
    for (phase, offset), tap in meets.items():
        table[phase, offset - min(offsets)] = tap
    return table, min(offsets)


def _forward(x, kernel, strides, paddings):
    return conv_transpose(x, kernel, strides, paddings), (x, kernel)


def _backward(strides, paddings, residuals, cotangent):
    x, kernel = residuals

    def adjoint(flipped):
        return conv(cotangent, flipped, strides, paddings)

    dx, kernel_vjp = jax.vjp(adjoint, _flip(kernel))
    (dkernel,) = kernel_vjp(x)
    return dx, _flip(dkernel)


conv_transpose.defvjp(_forward, _backward)


def _flip(kernel: Float[Array, "kh kw c d"]) -> Float[Array, "kh kw d c"]:
    return jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)


def _pads(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    if padding == "VALID":
        return 0, 0
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _transposed_pads(kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Padding of the dilated input, as `lax.conv_transpose` derives it from SAME and VALID."""
    if padding == "VALID":
        return kernel - 1, kernel - 1 + max(stride - kernel, 0)
    total = kernel + stride - 2
    low = kernel - 1 if stride > kernel - 1 else -(-total // 2)
    return low, total - low
