"""Data parallelism: where arrays live on a mesh with one axis, "data"."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over the given ones."""
    devices = jax.devices() if devices is None else devices
    # With Explicit axes, JAX's default, every operation would need a sharding of its own.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated_rows(mesh: Mesh) -> NamedSharding | Format:
    """Puts a whole matrix on every device, each row in one piece, so that rows can be gathered.

    A TPU's own choice for rows of, say, 784 bytes puts the columns in one piece instead; every call
    that gathers rows would then copy the whole matrix first.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return replicated(mesh)  # the same layout, and `put` maps the host's array without a copy
    return Format(Layout((0, 1)), replicated(mesh))


def put(array: np.ndarray, where: NamedSharding | Format) -> Array:
    """Puts a host array, the same in every process, on the devices."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def put_rows(array: np.ndarray, rows: np.ndarray, mesh: Mesh) -> Array:
    """Puts the chosen rows of a host array on the devices, split; a process reads only its own."""
    shape = (len(rows), *array.shape[1:])
    return jax.make_array_from_callback(
        shape, split_batch(mesh), lambda index: array[rows[(index or (slice(None),))[0]]]
    )


def on_host(tree: PyTree) -> Any:
    """The arrays of a tree in this process's memory, also those that lie on other processes too."""
    for leaf in jax.tree.leaves(tree):
        if _is_remote(leaf):
            tree = _on_all_devices(leaf.sharding.mesh)(tree)
            break
    return jax.device_get(tree)


@functools.cache  # of one function, since JAX compiles a new one anew
def _on_all_devices(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def _is_remote(leaf: Any) -> bool:
    return isinstance(leaf, Array) and not leaf.is_fully_addressable


def describe(mesh: Mesh) -> dict[str, str | int]:
    """Platform, kind and number of the devices, and the number of processes."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": mesh.size,
        "processes": jax.process_count(),
    }
