"""States as named NumPy arrays with their hashes, and configurations as JSON."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

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


def describe(array: np.ndarray) -> dict[str, Any]:
    """Returns an array's dtype, shape, and a SHA-256 of both and its bytes."""
    dtype, shape = array.dtype.name, [*array.shape]
    content = hashlib.sha256(f"{dtype}{shape}".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"dtype": dtype, "shape": shape, "sha256": content.hexdigest()}


def digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a dictionary's JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_json(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration as JSON reads it back: tuples become lists."""
    return json.loads(json.dumps(config))


def fields(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the leaves of a nested configuration by dotted name, as JSON text."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value)
    return found


def fingerprint(state: PyTree) -> str:
    """Returns a SHA-256 of a state's paths, dtypes, shapes and bytes."""
    return digest({name: describe(leaf) for name, leaf in leaves(to_host(state)).items()})
