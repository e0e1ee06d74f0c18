"""Convolution and transposed convolution, each the other's gradient.

With strides s, a convolution C_k of kernel k and its adjoint are, along each axis,

    y = C_k(x)      y[q] = Σ_t k[t] x[s·q + t − low]
    x = C_kᵀ(y)     x[s·q + t − low] += k[t] y[q]         (for all q and t)

A transposed convolution is such an adjoint: `conv_transpose(x, w)` = C_kᵀ(x), where k is w reversed
in space, with its channels exchanged. Since <g, C_k(x)> is linear in g, in k and in x, three maps
cover the forward and the backward pass:

    forward         gradient in the input    gradient in the kernel, for the cotangent g
    C_k(x)          C_kᵀ(g)                  ∂/∂k <g, C_k(x)>
    C_kᵀ(x)         C_k(g)                   ∂/∂k <x, C_k(g)>

Autodiff of a transposed convolution asks for convolutions that are dilated on both sides instead,
which XLA runs 6 to 18 times slower on a CPU. The values are the same to rounding.

Forward-mode differentiation raises JAX's own TypeError, as for every `jax.custom_vjp`; with
`kind="lax"` both are XLA's own, gradients included, which any transformation passes.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Padding = Literal["SAME", "VALID"]
KINDS = ("auto", "lax")
Pair = tuple[int, int]


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
    strides: Pair,
    paddings: tuple[Padding, Padding],
    kind: str = "auto",
) -> Float[Array, "b _ _ d"]:
    """Convolution, channels last, as `jax.lax.conv_general_dilated` defines it.

    Args:
        x: input images.
        kernel: height, width, input features, output features.
        strides: how many times each axis shrinks.
        paddings: "SAME" or "VALID", for each axis.
        kind: "auto", with the gradients above; or "lax", with XLA's own.

    Raises:
        ValueError: kind is none of these.
    """
    lows = tuple(
        _low(*axis) for axis in zip(x.shape[1:3], kernel.shape[:2], strides, paddings, strict=True)
    )
    sizes = tuple(
        output_size(*axis)
        for axis in zip(x.shape[1:3], kernel.shape[:2], strides, paddings, strict=True)
    )
    _check(kind)
    function = _plain_conv if kind == "lax" else _conv
    return function(x, kernel, strides, lows, sizes)


def conv_transpose(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    strides: Pair,
    paddings: tuple[Padding, Padding],
    kind: str = "auto",
) -> Float[Array, "b _ _ d"]:
    """Transposed convolution, channels last, as `jax.lax.conv_transpose` defines it.

    Args:
        x: input images.
        kernel: height, width, input features, output features.
        strides: how many times each axis grows.
        paddings: "SAME" (size · stride) or "VALID" (plus what the kernel overhangs), for each axis.
        kind: "auto", with the gradients above; or "lax", with XLA's own.

    Raises:
        ValueError: kind is none of these.
    """
    lows = tuple(
        _transposed_low(*axis) for axis in zip(kernel.shape[:2], strides, paddings, strict=True)
    )
    sizes = tuple(
        transposed_output_size(*axis)
        for axis in zip(x.shape[1:3], kernel.shape[:2], strides, paddings, strict=True)
    )
    _check(kind)
    function = _dilated if kind == "lax" else _adjoint
    return function(x, jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3), strides, lows, sizes)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


# C_k and its adjoint take strides, the `low` of each axis, and the sizes of their results.


def _plain_conv(x, kernel, strides: Pair, lows: tuple[int, ...], sizes: tuple[int, ...]):
    pads = [
        (low, (count - 1) * stride + taps - size - low)
        for low, count, stride, taps, size in zip(
            lows, sizes, strides, kernel.shape[:2], x.shape[1:3], strict=True
        )
    ]
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


_conv = jax.custom_vjp(_plain_conv, nondiff_argnums=(2, 3, 4))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _adjoint(y, kernel, strides: Pair, lows: Pair, sizes: Pair):
    native = functools.partial(_dilated, strides=strides, lows=lows, sizes=sizes)
    # `_by_rows` is faster once a quarter of the rows that `_by_phase` multiplies are zeros.
    overhangs = 3 * -(-sizes[0] // strides[0]) >= 4 * y.shape[1]
    if max(strides) == 1 and not overhangs:  # with one phase, `_by_phase` equals the native form
        return native(y, kernel)
    faster = _by_rows if overhangs else _by_phase
    on_cpu = functools.partial(faster, strides=strides, lows=lows, sizes=sizes)
    return lax.platform_dependent(y, kernel, cpu=on_cpu, default=native)


def _keep(function, x, kernel, *static):
    """The function's value, and the residuals of its gradients."""
    return function(x, kernel, *static), (x, kernel)


def _conv_backward(strides, lows, _, residuals, cotangent):
    x, kernel = residuals
    dx = _adjoint(cotangent, kernel, strides, lows, x.shape[1:3])
    return dx, _kernel_gradient(x, kernel, cotangent, strides, lows)


def _adjoint_backward(strides, lows, _, residuals, cotangent):
    y, kernel = residuals
    dy = _conv(cotangent, kernel, strides, lows, y.shape[1:3])
    return dy, _kernel_gradient(cotangent, kernel, y, strides, lows)


_conv.defvjp(functools.partial(_keep, _conv), _conv_backward)
_adjoint.defvjp(functools.partial(_keep, _adjoint), _adjoint_backward)


def _kernel_gradient(x, kernel, y, strides, lows):
    """∂/∂k <y, C_k(x)>, by autodiff; k itself does not occur in it."""

    def of_kernel(kernel):
        return _plain_conv(x, kernel, strides, lows, y.shape[1:3])

    return jax.linear_transpose(of_kernel, kernel)(y)[0]


def _dilated(y, kernel, strides, lows, sizes):
    """The adjoint as one convolution of y with zeros between its pixels."""
    pads = [
        (taps - 1 - low, size - (count - 1) * stride - 1 + low)
        for taps, low, size, count, stride in zip(
            kernel.shape[:2], lows, sizes, y.shape[1:3], strides, strict=True
        )
    ]
    flipped = jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)
    return lax.conv_general_dilated(
        y, flipped, (1, 1), pads, lhs_dilation=strides, dimension_numbers=_LAYOUT
    )


def _by_phase(y, kernel, strides, lows, sizes):
    """The adjoint as one convolution without zeros, whose features are its pixels in blocks.

    Along an axis, the pixel s·q + p sums k[t] y[q + (p + low − t)/s] over those t for which the
    division is even: for each phase p a few taps of the kernel. The convolution with all s phases
    side by side makes s pixels for each q, and interleaving them gives the image.
    """
    (rows, row_start), (cols, col_start) = (
        _taps(*axis) for axis in zip(kernel.shape[:2], strides, lows, strict=True)
    )
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))  # zero where a phase has no tap
    phases = jnp.transpose(padded[rows][:, :, cols], (1, 3, 5, 0, 2, 4))  # j i d p q c
    blocks = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    pads = [
        (-start, count - size + start + taps.shape[1] - 1)
        for start, count, size, taps in zip(
            (row_start, col_start), blocks, y.shape[1:3], (rows, cols), strict=True
        )
    ]
    x = lax.conv_general_dilated(
        y, phases.reshape(*phases.shape[:3], -1), (1, 1), pads, dimension_numbers=_LAYOUT
    )
    x = x.reshape(len(y), *blocks, *strides, kernel.shape[2]).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(len(y), blocks[0] * strides[0], blocks[1] * strides[1], kernel.shape[2])
    return x[:, : sizes[0], : sizes[1]]


def _by_rows(y, kernel, strides, lows, sizes):
    """The adjoint as one convolution along the columns, by phase, and a sum over the kernel's rows.

    Row t of the kernel makes the rows s·q + t − low of the image from the rows q of y. Where the
    image overhangs y, `_by_phase` multiplies rows of zeros; here there are none. Elsewhere
    `_by_phase` is faster: it needs no sum.
    """
    taps, start = _taps(kernel.shape[1], strides[1], lows[1])
    missing = max(strides[0] - kernel.shape[0], 0)  # so that each phase meets a row of the kernel
    padded = jnp.pad(kernel, ((0, missing), (0, 1), (0, 0), (0, 0)))
    phases = jnp.transpose(padded[:, taps], (2, 4, 0, 1, 3))  # j d t p c
    height, width = (-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    rows = lax.conv_general_dilated(
        y,
        phases.reshape(1, *phases.shape[:2], -1),
        window_strides=(1, 1),
        padding=((0, 0), (-start, width - y.shape[2] + start + taps.shape[1] - 1)),
        dimension_numbers=_LAYOUT,
        preferred_element_type=jnp.promote_types(y.dtype, jnp.float32),  # the sum is rounded once
    )
    rows = rows.reshape(*rows.shape[:3], len(padded), strides[1], kernel.shape[2])  # b q r t p c

    def moved(t: int, offset: int):
        """Row q + offset of the product with row t of the kernel, for each q below `height`."""
        zero = jnp.zeros((), rows.dtype)
        pads = ((0, 0, 0), (-offset, height - y.shape[1] + offset, 0), *3 * [(0, 0, 0)])
        return lax.pad(rows[:, :, :, t], zero, pads)

    def phase(p: int):
        """Rows s·q + p of the image, for all q."""
        met = [divmod(p + lows[0] - t, strides[0]) for t in range(len(padded))]
        return sum(moved(t, offset) for t, (offset, rest) in enumerate(met) if rest == 0)

    x = jnp.stack([phase(p) for p in range(strides[0])], axis=2).astype(y.dtype)
    x = x.reshape(len(y), height * strides[0], width * strides[1], kernel.shape[2])
    return x[:, : sizes[0], : sizes[1]]


def _taps(kernel: int, stride: int, low: int) -> tuple[np.ndarray, int]:
    """Which tap [phase, j] of a kernel meets y[q + start + j], `kernel` for none; and start."""
    meets = {
        (phase, (phase + low - tap) // stride): tap
        for phase in range(stride)
        for tap in range(kernel)
        if (phase + low - tap) % stride == 0
    }
    offsets = [offset for _, offset in meets]
    table = np.full((stride, max(offsets) - min(offsets) + 1), kernel)
    for (phase, offset), tap in meets.items():
        table[phase, offset - min(offsets)] = tap
    return table, min(offsets)


def _low(size: int, kernel: int, stride: int, padding: Padding) -> int:
    """Zeros in front of an axis; an odd one goes behind, as SAME has it."""
    if padding == "VALID":
        return 0
    return max((-(-size // stride) - 1) * stride + kernel - size, 0) // 2


def _transposed_low(kernel: int, stride: int, padding: Padding) -> int:
    """`low` of the convolution that `lax.conv_transpose` is the adjoint of."""
    if padding == "VALID" or stride > kernel - 1:
        return 0
    return (kernel - 1) - -(-(kernel + stride - 2) // 2)
