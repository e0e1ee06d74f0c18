"""Trees of many small arrays as one vector.

An accelerator starts a kernel for each array that a training step changes, and most arrays of a
network are so small that this takes longer than computing. Adam, moving averages and norms treat
all entries alike: of one vector, they are one kernel.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "others"],
    meta_fields=["structure", "leaves", "at_most"],
)
@dataclass(frozen=True)
class Flat:
    """A tree of arrays as few arrays.

    Attributes:
        vectors: the values of the small arrays of each dtype, in the tree's order.
        others: the other arrays, and what is flat already.
        structure: of the tree.
        leaves: shape and dtype of each of its small arrays, None in place of each other.
        at_most: the most values of a small array.
    """

    vectors: dict[str, Array]
    others: tuple[Any, ...]
    structure: Any
    leaves: tuple[tuple[tuple[int, ...], str] | None, ...]
    at_most: int


def flatten(tree: PyTree, at_most: int) -> Flat:
    """The tree as few arrays; those of more than `at_most` values stay as they are."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_flat)
    small = [not _is_flat(node) and node.size <= at_most for node in nodes]
    vectors: dict[str, list[Array]] = {}
    for node in itertools.compress(nodes, small):
        vectors.setdefault(str(node.dtype), []).append(node.ravel())
    return Flat(
        vectors={dtype: jnp.concatenate(parts) for dtype, parts in vectors.items()},
        others=tuple(n for n, is_small in zip(nodes, small, strict=True) if not is_small),
        structure=structure,
        leaves=tuple(
            (n.shape, str(n.dtype)) if is_small else None
            for n, is_small in zip(nodes, small, strict=True)
        ),
        at_most=at_most,
    )


def flatten_like(tree: PyTree, example: PyTree) -> PyTree:
    """The tree, flat if the example is."""
    return flatten(tree, example.at_most) if _is_flat(example) else tree


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


def flatten_parts(tree: PyTree, part: PyTree, at_most: int) -> PyTree:
    """Flattens each subtree that has the structure of this part of it.

    In a training state these are the parameters, the optimizer's moments and the moving average.
    """
    structure: Any = jax.tree.structure(part)

    def is_part(node: Any) -> bool:
        return bool(structure == jax.tree.structure(node))

    return jax.tree.map(lambda n: flatten(n, at_most) if is_part(n) else n, tree, is_leaf=is_part)


def restore_parts(tree: PyTree) -> PyTree:
    """The tree with each `Flat` in it restored; any other tree as it is."""
    return jax.tree.map(lambda n: restore(n) if _is_flat(n) else n, tree, is_leaf=_is_flat)


def _is_flat(node: Any) -> bool:
    return isinstance(node, Flat)
