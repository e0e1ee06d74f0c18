"""How a process is set up to be fast: it keeps its memory, and what it compiles."""

import ctypes
import pathlib
import platform

import jax

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees; call it before JAX starts its threads.

    On a CPU, XLA allocates the temporaries of a step anew each time. glibc hands pieces so large
    back to the operating system, which then has to clear each page again: up to a quarter of a
    training step. Elsewhere than with glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)  # other arenas cannot hold large pieces
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**28)


def keep_compiled_programs(directory: pathlib.Path) -> None:
    """Keep what JAX compiles in this directory, unless the user has chosen one for JAX already."""
    if getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009, unknown to mypy
        jax.config.update("jax_compilation_cache_dir", str(directory))
