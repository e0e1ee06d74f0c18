"""What tests share: double precision on request, real data where there is any, tiny runs."""

import importlib.util
import os
import pathlib

if importlib.util.find_spec("libtpu"):
    # The compilers of the extra `compiled` bring no devices, and JAX would warn of that each time.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On arrays this small, XLA takes longer to optimise than to compute; also in the processes that
# tests start, since the bits of a program depend on how it was compiled. With 0, all is as in use.
_DISABLED = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
jax.config.update("jax_disable_most_optimizations", _DISABLED)
# XLA's former emitters of loops compile twice as fast as those in use, and one module for LLVM a
# seventh faster than many.
_IN_USE = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
_FAST = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# Without what a process that started this one has added.
_FLAGS = os.environ.get("XLA_FLAGS", "").replace(_FAST, "").strip()
if _DISABLED:
    os.environ["XLA_FLAGS"] = f"{_FAST} {_FLAGS}"


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """One compilation cache for this process and those it starts.

    Workers of pytest-xdist have one each: JAX does not write its files at once, and what reads
    half a file prints a warning.
    """
    name = f"svae_jax_compilation_cache_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    directory = str(tmp_path_factory.getbasetemp().parent / name)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def optimised(monkeypatch):
    """Compilation as in use, with XLA's optimisations, also in the processes that a test starts."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    monkeypatch.setenv("XLA_FLAGS", _FLAGS)
    # A process reads its flags once; in this one, each program is compiled with an option instead.
    from jax._src import compiler  # jax has no public place for it; tried with 0.10.2

    options = compiler.get_compile_options

    def as_in_use(*args, env_options_overrides=(), **kwargs):
        overrides = dict(env_options_overrides) | _IN_USE
        return options(*args, env_options_overrides=overrides, **kwargs)

    monkeypatch.setattr(compiler, "get_compile_options", as_in_use)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", _DISABLED)


@pytest.fixture
def fresh_programs():
    """Nothing is compiled yet: JAX itself takes programs from before a change of `optimised`."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets programs before their memory maps reach Linux's limit of 65,530 for a process."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for the duration of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_floors(monkeypatch):
    """PCA beside an evaluation takes patches of at most 300 values: 4,096 take most of the time."""
    from svae_jax.model import linear

    monkeypatch.setattr(linear, "MAX_DIMS", 300)


@pytest.fixture
def no_pictures(monkeypatch):
    """Training draws no pictures, whose programs take long to compile."""
    from svae_jax.evaluation import previews

    monkeypatch.setattr(previews, "draw", lambda *args: {})


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder of 8×8 pictures, 48 to train and 20 to test: blobs of colour on noise."""
    from PIL import Image

    root = tmp_path_factory.mktemp("tiny_images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 20)):
        (root / split).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 60, (8, 8, 3))
            y, x = rng.integers(0, 5, 2)
            pixels[y : y + 4, x : x + 4] = rng.integers(100, 256, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / f"{i:03d}.png")
    return root


@pytest.fixture
def tiny_config(tiny_images, tmp_path_factory):
    """A configuration that trains on `tiny_images` in seconds."""
    from tests import tiny

    return tiny.config(tiny_images, tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def start():
    """`command_line.start`, whose processes do not outlive the test."""
    from tests import command_line

    processes = []

    def begin(*args, **kwargs):
        processes.append(command_line.start(*args, **kwargs))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()
