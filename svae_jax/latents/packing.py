"""Named arrays, and the flat vector that an encoder emits for them."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Params = dict[str, Float[Array, "..."]]
"""A posterior's arrays by name; the batch axes stand in front of each."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each array for one example."""


def count(shapes: Shapes) -> int:
    """How many numbers the arrays of one example hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def unpack(shapes: Shapes, flat: Float[Array, "*batch numbers"]) -> Params:
    """Cut a flat vector into named arrays, in the order of `shapes`.

    Args:
        shapes: name -> shape for one example.
        flat: ``[*batch, count(shapes)]``.

    Returns:
        name -> ``[*batch, *shape]``.
    """
    batch = flat.shape[:-1]
    params, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        params[name] = flat[..., start:stop].reshape(batch + shape)
        start = stop
    return params


def pack(shapes: Shapes, params: Params) -> Float[Array, " numbers"]:
    """Join the arrays of one example into a flat vector: the inverse of `unpack`, unbatched."""
    return jnp.concatenate([params[name].ravel() for name in shapes])
