"""How a process is set up."""

import logging
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from svae_jax.devices import runtime

FAULTS = """
import resource
import jax
import numpy as np
from svae_jax.devices import runtime
jax.config.update("jax_platforms", "cpu")
if {keep}:
    runtime.keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_that_was_freed_is_not_cleared_again():
    faults = {
        keep: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(keep=keep)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for keep in (True, False)
    }
    assert faults[True] < 100
    assert faults[False] > 5 * faults[True]


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux")
def test_what_is_reserved_takes_no_memory():
    code = """
import jax
from svae_jax.devices import runtime
jax.config.update("jax_platforms", "cpu")
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
before = resident()
runtime.keep_freed_memory()
print(resident() - before)
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(output) < 20_000  # kB


def test_the_allocator_stays_as_it_is_where_another_device_may_compute(monkeypatch):
    chosen = jax.config.jax_platforms
    monkeypatch.setattr(runtime.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(runtime.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: pytest.fail("the allocator is set"))
    try:
        for platforms in (None, "cuda", "cuda,cpu"):
            jax.config.update("jax_platforms", platforms)
            runtime.keep_freed_memory()
    finally:
        jax.config.update("jax_platforms", chosen)


def test_the_users_own_compilation_cache_stays(tmp_path):
    chosen = jax.config.jax_compilation_cache_dir
    runtime.keep_compiled_programs(tmp_path)
    assert chosen == jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        runtime.keep_compiled_programs(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)


def test_the_compilers_of_other_devices_are_left_out(monkeypatch):
    chosen = jax.config.jax_platforms
    try:
        for files, platforms in ((["/dev/nvidia0"], None), ([], "cpu")):
            monkeypatch.setattr(runtime.glob, "glob", lambda pattern, files=files: files)
            monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name)
            jax.config.update("jax_platforms", None)
            runtime.leave_out_compilers()
            assert jax.config.jax_platforms == platforms
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
        jax.config.update("jax_platforms", None)
        runtime.leave_out_compilers()
        assert jax.config.jax_platforms is None
    finally:
        jax.config.update("jax_platforms", chosen)


def test_the_packages_numbers_are_of_32_bits_whatever_the_user_sets():
    @runtime.own_numerics()
    def add():
        return jnp.zeros(2) + jnp.arange(2) + jnp.zeros((2, 2))

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        with jax.numpy_rank_promotion("raise"):
            assert add().dtype == jnp.float32
        assert jnp.zeros(2).dtype == jnp.float64


def test_a_plug_in_that_fails_is_told_in_one_line(caplog):
    runtime.shorten_plugin_errors()
    try:
        raise RuntimeError("Unable to load cuDNN")
    except RuntimeError:
        logging.getLogger("jax._src.xla_bridge").exception("Jax plugin %s", "error")
    (record,) = caplog.records
    assert record.getMessage() == "Jax plugin error: Unable to load cuDNN"
    assert record.exc_info is None
