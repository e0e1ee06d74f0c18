"""The process: settings that make it fast, and the versions of its libraries."""

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import jax

# From glibc's <malloc.h> and Linux's <sys/mman.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE = 14

_HEAP = 2**30  # bytes of address space in large pages
_LARGE_PAGE = 2**21

_DEVICE_FILES = ("/dev/nvidia*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/dxg", "/dev/kfd")

# JAX's defaults.
_NUMERICS: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}

_LIBRARIES = ("svae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "clu", "numpy")


def keep_freed_memory() -> None:
    """Makes the process keep the memory that it frees; call it before JAX starts its threads.

    On a CPU, XLA allocates a step's temporaries anew each time. glibc returns such large blocks to
    the operating system, which must clear each page again. Keeping them, in large pages where Linux
    has them, makes a training step faster by a fifth; a flow's, of many small arrays, takes 8 to
    28% longer, as threads then share one arena. Without glibc this does nothing, nor where JAX may
    use another device, on which it was not measured.
    """
    is_on_cpu = _chosen_platforms() == "cpu" or not _has_device_files()
    if platform.libc_ver()[0] != "glibc" or not is_on_cpu:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)  # other arenas cannot hold large blocks
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**28)
    # Reserve the start of the heap, ask for large pages there, and return it to malloc. Pages that
    # are never touched take no memory.
    libc.malloc.restype = ctypes.c_void_p
    heap = libc.malloc(ctypes.c_size_t(_HEAP))
    if heap is not None:
        begin = -(-heap // _LARGE_PAGE) * _LARGE_PAGE
        size = ctypes.c_size_t(heap + _HEAP - begin)
        libc.madvise(ctypes.c_void_p(begin), size, _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))


def keep_compiled_programs(directory: pathlib.Path) -> None:
    """Caches compiled programs in this directory, unless JAX was given another one already."""
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009, unknown to mypy
        jax.config.update("jax_compilation_cache_dir", str(directory))


def leave_out_compilers() -> None:
    """Keeps JAX to the CPU where the extra `compiled` is installed and no device is there.

    JAX would try to start the devices of its compilers, which print pages of what they lack.
    """
    if not _chosen_platforms() and importlib.util.find_spec("libtpu") and not _has_device_files():
        jax.config.update("jax_platforms", "cpu")


def _chosen_platforms() -> str | None:
    return getattr(jax.config, "jax_platforms")  # noqa: B009, unknown to mypy


def shorten_plugin_errors() -> None:
    """Makes JAX tell in one line, without a traceback, why it cannot use a kind of device."""
    logging.getLogger("jax._src.xla_bridge").addFilter(_shortened)


def _shortened(record: logging.LogRecord) -> bool:
    if record.exc_info and (error := record.exc_info[1]):
        record.msg, record.args = f"{record.getMessage()}: {error}", ()
        record.exc_info = None
    return True


def _has_device_files() -> bool:
    """Whether Linux has files of GPUs or TPUs; True on other systems, which do not tell."""
    return not os.path.isdir("/dev") or any(map(glob.glob, _DEVICE_FILES))


def set_numerics() -> None:
    """Sets JAX's rules of dtypes and ranks, in this process, to those of the package."""
    for name, value in _NUMERICS.items():
        jax.config.update(name, value)


@contextlib.contextmanager
def own_numerics() -> Iterator[None]:
    """Computes by the rules of `set_numerics`, whatever the user has set; also a decorator.

    With 64 bits, parameters would be of float64, and only go on where these are allowed.
    """
    x64, dtypes, ranks = _NUMERICS.values()
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
        yield


def versions() -> dict[str, str]:
    """The versions of the installed libraries on which a run's results depend."""
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
