"""The devices that programs are compiled for, none of which has to be present.

XLA's compilers for GPUs and TPUs run on any machine. All they need is a description of the device.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence

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


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU of NVIDIA, by the numbers of its data sheet.

    Attributes:
        name: what the driver calls it.
        capability: CUDA compute capability, such as 9.0 for Hopper.
        cores: streaming multiprocessors.
        fpus: float32 units a core.
        threads: most resident threads a core.
        shared_memory: bytes a core.
        l2: bytes of the second cache.
        clock: GHz.
        memory: bytes.
        bandwidth: bytes of memory a second.
        flops: a second, by dtype; float32 in TF32 where the device has it, as JAX does by default.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared_memory: int
    l2: int
    clock: float
    memory: int
    bandwidth: float
    flops: Mapping[str, float]

    def topology(self, layout: str) -> Sequence[jax.Device]:
        """The devices of a host with so many GPUs, "1" or "4"."""
        _require("jax_plugins.xla_cuda13", "jax-cuda13-plugin")
        return topologies.get_topology_desc(
            "", "cuda", topology=f"1x1x{layout}", target_config=self._config()
        ).devices

    def _config(self) -> str:
        """The device as XLA's `GpuTargetConfigProto` in text form."""
        limits = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 2**10,
            "shared_memory_per_core": self.shared_memory,
            "shared_memory_per_block_optin": self.shared_memory - 2**10,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "memory_bandwidth": round(self.bandwidth),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
        }
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              {" ".join(f"{name}: {value}" for name, value in limits.items())}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU of Google, by the numbers of its documentation.

    Attributes:
        name: what Google calls it.
        clock: GHz; the peak FLOPs over what the matrix units do in a cycle.
        memory: bytes a chip.
        bandwidth: bytes of memory a second.
        flops: a second, by dtype; the factors of float32 products are rounded to bfloat16.
    """

    name: str
    clock: float
    memory: int
    bandwidth: float
    flops: Mapping[str, float]

    def topology(self, layout: str) -> Sequence[jax.Device]:
        """The chips of a slice, such as "2x2"; "1" is a single chip."""
        _require("libtpu", "libtpu")
        os.environ.update(_TPU_ENVIRONMENT)
        family, single = self.name.lower(), layout == "1"
        single_layout = "1x1x1" if family == "v5p" else "1x1"
        options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
        return topologies.get_topology_desc(
            f"{family}:{single_layout if single else layout}", "tpu", **options
        ).devices


Device = Gpu | Tpu

_HOPPER = {
    "capability": (9, 0), "cores": 132, "fpus": 128, "threads": 2048, "shared_memory": 228 * 2**10,
    "l2": 50 * 2**20, "clock": 1.98, "flops": {"float32": 494.7e12, "bfloat16": 989.4e12},
}  # fmt: skip

DEVICES: dict[str, Device] = {
    "h200": Gpu(name="NVIDIA H200", memory=141 * 2**30, bandwidth=4.8e12, **_HOPPER),
    "h100": Gpu(name="NVIDIA H100 80GB HBM3", memory=79 * 2**30, bandwidth=3.35e12, **_HOPPER),
    "b200": Gpu(
        name="NVIDIA B200", capability=(10, 0), cores=148, fpus=128, threads=2048,
        shared_memory=228 * 2**10, l2=126 * 2**20, clock=1.965, memory=178 * 2**30,
        bandwidth=7.7e12, flops={"float32": 1.1e15, "bfloat16": 2.25e15},
    ),
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB", capability=(8, 0), cores=108, fpus=64, threads=2048,
        shared_memory=164 * 2**10, l2=40 * 2**20, clock=1.41, memory=79 * 2**30,
        bandwidth=2.039e12, flops={"float32": 156e12, "bfloat16": 312e12},
    ),
    "l4": Gpu(
        name="NVIDIA L4", capability=(8, 9), cores=58, fpus=128, threads=1536,
        shared_memory=100 * 2**10, l2=48 * 2**20, clock=2.04, memory=22 * 2**30,
        bandwidth=300e9, flops={"float32": 60e12, "bfloat16": 121e12},
    ),
    "t4": Gpu(
        name="Tesla T4", capability=(7, 5), cores=40, fpus=64, threads=1024,
        shared_memory=64 * 2**10, l2=4 * 2**20, clock=1.59, memory=15 * 2**30,
        bandwidth=320e9, flops={"float32": 8.1e12, "bfloat16": 8.1e12},  # no TF32, no bfloat16
    ),
    "v5e": Tpu("v5e", 1.5, 16 * 10**9, 819e9, {"float32": 197e12, "bfloat16": 197e12}),
    "v5p": Tpu("v5p", 1.75, 95 * 10**9, 2765e9, {"float32": 459e12, "bfloat16": 459e12}),
    "v6e": Tpu("v6e", 1.75, 32 * 10**9, 1640e9, {"float32": 918e12, "bfloat16": 918e12}),
}  # fmt: skip


def find(target: str) -> tuple[Device, str]:
    """The device of a target such as `h200`, `h200:4` or `v5e:2x2`, and its layout.

    Raises:
        UserError: for an unknown device or layout; the message says what there is.
    """
    name, _, layout = target.partition(":")
    if name not in DEVICES:
        raise UserError(f"--target={target}: the device must be one of {', '.join(DEVICES)}")
    device, layout = DEVICES[name], layout or "1"
    sides = layout.split("x")
    if not all(side.isdecimal() and int(side) for side in sides) or (
        isinstance(device, Gpu) and len(sides) > 1
    ):
        example = f"{name}:4" if isinstance(device, Gpu) else f"{name}:2x2"
        raise UserError(f"--target={target}: several devices are written as in {example}")
    return device, layout


def num_devices(layout: str) -> int:
    """How many devices "4" or "2x2" is."""
    return math.prod(map(int, layout.split("x")))


def devices(target: str) -> Sequence[jax.Device]:
    """The devices of a target, to compile for; they compute nothing.

    Raises:
        UserError: where the compiler's package is missing, or it does not know the layout.
    """
    device, layout = find(target)
    try:
        return device.topology(layout)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"--target={target}: the compiler says: {first_line}") from None


def _require(module: str, package: str) -> None:
    """Checks that a compiler is installed, without importing it.

    Raises:
        UserError: naming the package, and the command that installs it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UserError(
            f"the compiler is missing: no package {package}; pip install -e '.[compiled]'"
        )
