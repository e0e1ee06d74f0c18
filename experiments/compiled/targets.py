"""The devices that programs are compiled for, none of which has to be present.

XLA's compilers for GPUs and TPUs run on any machine. All they need is a description of the device.
"""

import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from svae_jax.errors import UserError

# Before libtpu is loaded: it would otherwise ask a cloud machine's metadata server what it is, and
# refuse to compile in two processes at once.
_TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class Device(NamedTuple):
    """A GPU of NVIDIA or a TPU of Google, by the numbers of its data sheet.

    Attributes:
        name: what the driver or Google calls it.
        memory: bytes.
        bandwidth: bytes of memory a second.
        flops: a second, by dtype; float32 as JAX multiplies by default, in TF32 or bfloat16.
        clock: GHz; of a TPU the peak FLOPs over what the matrix units do in a cycle.
        details: of a GPU, what XLA's `GpuDeviceInfoProto` says besides; of a TPU none.
    """

    name: str
    memory: int
    bandwidth: float
    flops: Mapping[str, float]
    clock: float
    details: Mapping[str, Any] = {}

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU."""
        return not self.details


def _gpu(
    capability: tuple[int, int], cores: int, fpus: int, threads: int, shared: int, l2: int
) -> dict[str, Any]:
    """Compute capability; streaming multiprocessors and, of each, units, threads, KiB; MiB."""
    return {
        "cuda_compute_capability": "{{ major: {} minor: {} }}".format(*capability),
        "core_count": cores,
        "fpus_per_core": fpus,
        "threads_per_core_limit": threads,
        "shared_memory_per_core": shared * 2**10,
        "shared_memory_per_block_optin": (shared - 1) * 2**10,
        "l2_cache_size": l2 * 2**20,
        "shared_memory_per_block": 48 * 2**10,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }


def _flops(float32: float, bfloat16: float) -> dict[str, float]:
    return {"float32": float32 * 1e12, "bfloat16": bfloat16 * 1e12}


_HOPPER: Any = (_flops(494.7, 989.4), 1.98, _gpu((9, 0), 132, 128, 2048, 228, 50))
_BLACKWELL: Any = (_flops(1100, 2250), 1.965, _gpu((10, 0), 148, 128, 2048, 228, 126))
_AMPERE: Any = (_flops(156, 312), 1.41, _gpu((8, 0), 108, 64, 2048, 164, 40))
_ADA: Any = (_flops(60, 121), 2.04, _gpu((8, 9), 58, 128, 1536, 100, 48))
_TURING: Any = (_flops(8.1, 8.1), 1.59, _gpu((7, 5), 40, 64, 1024, 64, 4))  # no TF32, no bfloat16

DEVICES = {
    "h200": Device("NVIDIA H200", 141 * 2**30, 4.8e12, *_HOPPER),
    "h100": Device("NVIDIA H100 80GB HBM3", 79 * 2**30, 3.35e12, *_HOPPER),
    "b200": Device("NVIDIA B200", 178 * 2**30, 7.7e12, *_BLACKWELL),
    "a100": Device("NVIDIA A100-SXM4-80GB", 79 * 2**30, 2.039e12, *_AMPERE),
    "l4": Device("NVIDIA L4", 22 * 2**30, 300e9, *_ADA),
    "t4": Device("Tesla T4", 15 * 2**30, 320e9, *_TURING),
    "v5e": Device("v5e", 16 * 10**9, 819e9, _flops(197, 197), 1.5),
    "v5p": Device("v5p", 95 * 10**9, 2765e9, _flops(459, 459), 1.75),
    "v6e": Device("v6e", 32 * 10**9, 1640e9, _flops(918, 918), 1.75),
}


def find(target: str) -> tuple[Device, int]:
    """The device of a target such as `h200`, `h200:4` or `v5e:2x2`, and how many there are.

    Raises:
        UserError: for an unknown device or layout; the message says what there is.
    """
    name, _, layout = target.partition(":")
    if name not in DEVICES:
        raise UserError(f"--target={target}: the device must be one of {', '.join(DEVICES)}")
    device, sides = DEVICES[name], (layout or "1").split("x")
    one_number = device.is_tpu or len(sides) == 1
    if not (one_number and all(side.isdecimal() and int(side) for side in sides)):
        example = f"{name}:2x2" if device.is_tpu else f"{name}:4"
        raise UserError(f"--target={target}: several devices are written as in {example}")
    return device, math.prod(map(int, sides))


def devices(target: str) -> Sequence[jax.Device]:
    """The devices of a target, to compile for; they compute nothing.

    Raises:
        UserError: where the compiler's package is missing, or it does not know the layout.
    """
    device, count = find(target)
    package = "libtpu" if device.is_tpu else "jax-cuda13-plugin"
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        cure = "pip install -e '.[compiled]'"
        raise UserError(f"the compiler is missing: no package {package}; {cure}") from None
    if device.is_tpu:
        os.environ.update(_TPU_ENVIRONMENT)
        alone = "1x1x1" if device.name == "v5p" else "1x1"
        layout = alone if count == 1 else target.partition(":")[2]
        known = (f"{device.name}:{layout}", "tpu")
        options: Any = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    else:
        known = ("", "cuda")
        options = {"topology": f"1x1x{count}", "target_config": _config(device)}
    try:
        return topologies.get_topology_desc(*known, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"--target={target}: the compiler says: {first_line}") from None


def _config(device: Device) -> str:
    """A GPU as XLA's `GpuTargetConfigProto` in text form."""
    known = {
        "memory_bandwidth": round(device.bandwidth),
        "clock_rate_ghz": device.clock,
        "device_memory_size": device.memory,
        **device.details,
    }
    return f"""
        gpu_device_info {{ {" ".join(f"{name}: {value}" for name, value in known.items())} }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{device.name}"
    """
