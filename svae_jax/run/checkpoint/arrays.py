"""States as named NumPy arrays with their hashes, and configurations as JSON."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

PyTree = Any


def to_host(state: PyTree) -> PyTree:
    """Copies the state to NumPy arrays.

    It copies on CPU too, where NumPy could share the device's buffer: a training step could then
    not reuse a donated buffer and would allocate a new one.
    """
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and "cpu" not in {d.platform for d in leaf.devices()}:
            leaf.copy_to_host_async()  # on CPU this would share the device's buffer
    return jax.tree.map(lambda leaf: np.array(leaf, order="C"), state)


def leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, such as `opt_state/0/mu/encoder/kernel`.

    A NamedTuple has the same paths as the dictionary in which Orbax saves it.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    if len(named) != len(found):
        raise ValueError("two leaves of the state have the same path: a key holds a slash")
    return named


def describe(tree: PyTree) -> dict[str, dict[str, Any]]:
    """Returns each array's dtype, shape, and a SHA-256 of both and its bytes, by path."""
    return {name: _describe(array) for name, array in leaves(tree).items()}


def _describe(array: np.ndarray) -> dict[str, Any]:
    dtype, shape = array.dtype.name, [*array.shape]
    content = hashlib.sha256(f"{dtype}{shape}".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"dtype": dtype, "shape": shape, "sha256": content.hexdigest()}


def digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a dictionary's JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(state: PyTree) -> str:
    """Returns a SHA-256 of a state's paths, dtypes, shapes and bytes."""
    return digest(describe(to_host(state)))


def fields(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the leaves of a nested configuration by dotted name, as JSON text."""
    flat = traverse_util.flatten_dict(dict(config), sep=".")
    return {name: json.dumps(value) for name, value in flat.items()}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the names, in order, whose values differ or are in one of the mappings only."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
