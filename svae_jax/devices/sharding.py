"""Where arrays live: data parallelism over a mesh with the one axis "data"."""

from collections.abc import Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over the given ones."""
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default, would want every operation's sharding spelled out.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put(array: np.ndarray, where: NamedSharding) -> Array:
    """A host array, the same in every process, on the devices."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def put_rows(array: np.ndarray, rows: np.ndarray, mesh: Mesh) -> Array:
    """The chosen rows of a host array, split over the devices; each process reads only its own."""
    shape = (len(rows), *array.shape[1:])
    return jax.make_array_from_callback(
        shape, split_batch(mesh), lambda index: array[rows[(index or (slice(None),))[0]]]
    )


def describe(mesh: Mesh) -> dict[str, str | int]:
    """The platform and kind of the devices, their number, and that of the processes."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": mesh.size,
        "processes": jax.process_count(),
    }
