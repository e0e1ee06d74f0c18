"""Trees of many small arrays as one vector.

An accelerator starts a kernel for each array that an update changes, and most arrays of a network
are so small that this takes longer than computing. Adam, moving averages and norms treat all
numbers alike: of one vector, they are one kernel.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

_LARGE = 2**20  # arrays with more values stay as they are: copying them would take longer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "others"],
    meta_fields=["structure", "leaves"],
)
@dataclass(frozen=True)
class Flat:
    """A tree of arrays as few arrays.

    Attributes:
        vectors: the values of the small arrays of each dtype, in the tree's order.
        others: the other arrays, and what is flat already.
        structure: of the tree.
        leaves: shape and dtype of each of its small arrays, None in place of each other.
    """

    vectors: dict[str, Array]
    others: tuple[Any, ...]
    structure: Any
    leaves: tuple[tuple[tuple[int, ...], str] | None, ...]


def flatten(tree: PyTree) -> Flat:
    """The tree as few arrays."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_flat)
    vectors: dict[str, list[Array]] = {}
    for node in filter(_is_small, nodes):
        vectors.setdefault(str(node.dtype), []).append(node.ravel())
    return Flat(
        vectors={dtype: jnp.concatenate(parts) for dtype, parts in vectors.items()},
        others=tuple(node for node in nodes if not _is_small(node)),
        structure=structure,
        leaves=tuple((n.shape, str(n.dtype)) if _is_small(n) else None for n in nodes),
    )


def restore(flat: Flat) -> PyTree:
    """The inverse of `flatten`."""
    starts, others, nodes = dict.fromkeys(flat.vectors, 0), iter(flat.others), []
    for leaf in flat.leaves:
        if leaf is None:
            nodes.append(next(others))
            continue
        shape, dtype = leaf
        start, size = starts[dtype], math.prod(shape)
        starts[dtype] += size
        nodes.append(flat.vectors[dtype][start : start + size].reshape(shape))
    return jax.tree.unflatten(flat.structure, nodes)


def flatten_parts(tree: PyTree, part: PyTree) -> PyTree:
    """Flattens each subtree that has the structure of this part of it.

    In a training state these are the parameters, the optimizer's moments and the moving average.
    """
    structure = jax.tree.structure(part)

    def is_part(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda n: flatten(n) if is_part(n) else n, tree, is_leaf=is_part)


def restore_parts(tree: PyTree) -> PyTree:
    """The tree with each `Flat` in it restored; any other tree as it is."""
    return jax.tree.map(lambda n: restore(n) if _is_flat(n) else n, tree, is_leaf=_is_flat)


def _is_flat(node: Any) -> bool:
    return isinstance(node, Flat)


def _is_small(node: Any) -> bool:
    return not _is_flat(node) and node.size <= _LARGE
