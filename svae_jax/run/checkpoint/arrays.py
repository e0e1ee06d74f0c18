"""A state as NumPy arrays by name, and hashes of them; a configuration as JSON."""

import hashlib
import json
from typing import Any

import jax
import numpy as np

PyTree = Any


def to_host(state: PyTree) -> PyTree:
    """A copy of the state as NumPy arrays.

    A copy even on CPU, where NumPy could look into the device's own buffer: a train step that is
    given this buffer to reuse would have to leave it alone and take a new one.
    """
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and "cpu" not in {d.platform for d in leaf.devices()}:
            leaf.copy_to_host_async()  # on a CPU it would take hold of the device's own buffer
    return jax.tree.map(lambda leaf: np.array(leaf, order="C"), state)


def leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, like `opt_state/0/mu/encoder/kernel`.

    The paths of a NamedTuple are those of the dictionary that Orbax makes of it.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    if len(named) != len(found):
        raise ValueError("two leaves of the state have the same path: a key holds a slash")
    return named


def describe(array: np.ndarray) -> dict[str, Any]:
    """An array's dtype and shape, and a SHA-256 over both and its bytes."""
    dtype, shape = array.dtype.name, [*array.shape]
    content = hashlib.sha256(f"{dtype}{shape}".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"dtype": dtype, "shape": shape, "sha256": content.hexdigest()}


def digest(content: dict[str, Any]) -> str:
    """A SHA-256 over what JSON makes of a dictionary."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_json(config: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of a configuration: lists for tuples."""
    return json.loads(json.dumps(config))


def fields(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of a nested configuration by dotted name, as JSON text."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value)
    return found


def fingerprint(state: PyTree) -> str:
    """A SHA-256 over a state's paths, dtypes, shapes and bytes: the same only for equal states."""
    return digest({name: describe(leaf) for name, leaf in leaves(to_host(state)).items()})
