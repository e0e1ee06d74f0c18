"""Any number of rows, such as images, in batches of one size over the devices.

Everything that goes through a set in batches does so here: evaluation, encoding, fitting, drawing,
exploring. What a batch holds does not depend on the number of devices: copies fill it up to a
multiple of it, and JAX's random numbers begin alike whatever the length of an array.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from svae_jax.devices import sharding

_MOST_VALUES = 2**24  # of the rows of a batch, which bounds the memory

Rows = Shaped[np.ndarray, "_n ..."]


class Batch(NamedTuple):
    """Consecutive rows of a set.

    Attributes:
        begin: how many rows come before.
        size: how many rows count; the others are copies of the last of them.
        rows: on the devices, split over them.
    """

    begin: int
    size: int
    rows: Shaped[Array, "b ..."]

    @property
    def inside(self) -> Bool[np.ndarray, " b"]:
        """Which rows count."""
        return np.arange(len(self.rows)) < self.size


def size_for(shape: tuple[int, ...], most: int) -> int:
    """Rows of this shape in a batch: `most`, or fewer where they are large."""
    return max(1, min(most, _MOST_VALUES // math.prod(shape)))


def split(
    rows: Rows,
    size: int,
    mesh: Mesh | None = None,
    chosen: Int[np.ndarray, " m"] | None = None,
) -> Iterator[Batch]:
    """Batches of consecutive rows.

    Args:
        rows: on the host, in memory or mapped.
        size: rows of a batch, over all devices. All batches have the same shape, so that nothing is
            compiled anew for the last one.
        mesh: the devices; by default all of this process.
        chosen: indices of the rows that are taken, in this order; all by default.
    """
    mesh = sharding.make_mesh(jax.local_devices()) if mesh is None else mesh
    chosen = np.arange(len(rows)) if chosen is None else chosen
    places = np.arange(-(-size // mesh.size) * mesh.size)
    for begin in range(0, len(chosen), size):
        last = min(size, len(chosen) - begin) - 1
        index = chosen[begin + np.minimum(places, last)]
        yield Batch(begin, last + 1, sharding.put_rows(rows, index, mesh))


def over(
    function: Callable[[Batch], PyTree], rows: Rows, size: int, mesh: Mesh | None = None
) -> Iterator[Any]:
    """What a function gives for each batch, on the host, without that of the copies.

    Args:
        function: a batch -> a tree of arrays ``[b, ...]``.
        rows: as for `split`.
        size: as for `split`.
        mesh: as for `split`.
    """
    for batch in split(rows, size, mesh):
        result = sharding.on_host(function(batch))
        yield jax.tree.map(lambda leaf, size=batch.size: leaf[:size], result)


def gather(
    function: Callable[[Batch], PyTree], rows: Rows, size: int, mesh: Mesh | None = None
) -> Any:
    """What `over` yields, joined; there must be one row at least."""
    parts = list(over(function, rows, size, mesh))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
