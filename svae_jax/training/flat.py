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
    data_fields=["vector", "large"],
    meta_fields=["structure", "shapes"],
)
@dataclass(frozen=True)
class Flat:
    """A tree of float32 arrays as few arrays.

    Attributes:
        vector: the values of all small arrays, in the tree's order.
        large: the other arrays.
        structure: of the tree.
        shapes: of all its arrays.
    """

    vector: Array
    large: tuple[Array, ...]
    structure: Any
    shapes: tuple[tuple[int, ...], ...]


def flatten(tree: PyTree) -> Flat:
    """The tree as few arrays; it holds one small array at least."""
    leaves, structure = jax.tree.flatten(tree)
    small = [leaf.ravel() for leaf in leaves if leaf.size <= _LARGE]
    large = tuple(leaf for leaf in leaves if leaf.size > _LARGE)
    return Flat(jnp.concatenate(small), large, structure, tuple(leaf.shape for leaf in leaves))


def unflatten(tree: PyTree) -> PyTree:
    """The tree with each `Flat` in it as the tree that it was made of."""
    return jax.tree.map(
        lambda node: _restore(node) if isinstance(node, Flat) else node,
        tree,
        is_leaf=lambda node: isinstance(node, Flat),
    )


def _restore(flat: Flat) -> PyTree:
    start, large, leaves = 0, iter(flat.large), []
    for shape in flat.shapes:
        size = math.prod(shape)
        if size > _LARGE:
            leaves.append(next(large))
        else:
            leaves.append(flat.vector[start : start + size].reshape(shape))
            start += size
    return jax.tree.unflatten(flat.structure, leaves)


def flatten_like(tree: PyTree, example: PyTree) -> PyTree:
    """The tree, flattened if the example is flat."""
    return flatten(tree) if isinstance(example, Flat) else tree


def flatten_inside(tree: PyTree, *parts: PyTree) -> PyTree:
    """Flattens each subtree that has the structure of one of the parts.

    Of a training state with the parts `params` and `batch_stats`, those are flat then, and so are
    the optimizer's moments and the moving averages.
    """
    structures = [jax.tree.structure(part) for part in parts if jax.tree.leaves(part)]

    def is_part(node: Any) -> bool:
        return jax.tree.structure(node) in structures

    return jax.tree.map(
        lambda node: flatten(node) if is_part(node) else node, tree, is_leaf=is_part
    )
