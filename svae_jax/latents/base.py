"""What a posterior is made of: the protocols of its parts, and its arrays as one flat vector."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Params = dict[str, Float[Array, "..."]]
"""A posterior's arrays by name; the batch axes stand in front of each."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each array for one example."""


@runtime_checkable
class Mean(Protocol):
    """How the mean of each map is built from emitted arrays; frozen and hashable."""

    @property
    def height(self) -> int:
        """Rows h of a map."""

    @property
    def width(self) -> int:
        """Columns w of a map."""

    @property
    def maps(self) -> int:
        """The number of maps N."""

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""

    def mean(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The mean M, ``[*batch, h, w, n]``."""

    @property
    def scales(self) -> Mapping[str, float]:
        """Array -> the factor on what an encoder emits for it, where that is not 1."""

    def initial(self, key: PRNGKeyArray) -> Params:
        """One example's arrays at the start of training."""


@runtime_checkable
class Covariance(Protocol):
    """How the covariance SSᵀ of each map's hw entries is built; frozen and hashable.

    All arrays at zero must give the identity, the covariance of the prior.
    """

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""

    def colour(
        self, params: Params, noise: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """S·noise."""

    def whiten(
        self, params: Params, deviation: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """The inverse of `colour`."""

    def log_det(self, params: Params) -> Float[Array, "*batch n"]:
        """log|SSᵀ|."""

    def trace(self, params: Params) -> Float[Array, "*batch n"]:
        """tr SSᵀ."""

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The root of the diagonal of SSᵀ."""


def count(shapes: Shapes) -> int:
    """How many numbers the arrays of one example hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def unpack(shapes: Shapes, flat: Float[Array, "*batch numbers"]) -> Params:
    """Cuts a flat vector into named arrays, in the order of `shapes`.

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
    """Joins the arrays of one example into a flat vector: the inverse of `unpack`, unbatched."""
    return jnp.concatenate([params[name].ravel() for name in shapes])
