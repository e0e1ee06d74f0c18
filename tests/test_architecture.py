"""The order of the rooms: imports point only downward, and the heavy ones stand in one place."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "svae_jax"

# From the top down: a module imports only from rows below its own.
ROWS = [
    {"main"},
    {"train"},
    {"explore"},
    {"evaluate", "feed"},
    {"checkpoint", "data", "config"},
    {"step"},
    {"model"},
    {"networks", "objective"},
    {"convolutions", "datasets", "latents", "metrics"},
    {"cache", "images", "interrupt", "progress", "sharding", "lazy_tensorflow", "workdir"},
    {"compiler", "errors", "runtime"},
]
COMPUTE = {
    "compiler", "convolutions", "images", "latents", "model", "networks", "objective", "sharding",
    "step",
}  # fmt: skip
ALLOWED_IN_COMPUTE = {"jax", "flax", "optax", "numpy", "jaxtyping", "svae_jax"}
PURE_STDLIB = {"collections", "dataclasses", "functools", "math", "re", "typing"}
HOMES = {
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data", "datasets"},
    "ml_collections": {"config", "explore", "main", "train"},
    "tensorflow": {"lazy_tensorflow"},
    "tensorboard": {"metrics"},
    "clu": {"evaluate", "metrics"},
    "PIL": {"data", "datasets", "metrics"},
    "filelock": {"workdir"},
}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    """(top-level package, room of svae_jax or None) of every import in a file, wherever it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            assert name != "svae_jax", f"{path}: import a room, not the package"
            yield parts[0], parts[1] if parts[0] == "svae_jax" and len(parts) > 1 else None


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_its_row():
    assert {_room(path) for path in FILES} == set().union(*ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_downward(path):
    row = {room: depth for depth, rooms in enumerate(ROWS) for room in rooms}
    for package, room in _imports(path):
        if package == "svae_jax" and room != _room(path):
            assert row[room] > row[_room(path)], f"{path.name} imports svae_jax.{room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_have_one_home(path):
    for package, _ in _imports(path):
        assert _room(path) in HOMES.get(package, {_room(path)}), f"{path.name} imports {package}"
        if _room(path) in COMPUTE:
            known = package in ALLOWED_IN_COMPUTE | PURE_STDLIB
            assert known, f"{path.name} imports {package}"
        assert package != "__future__"


def test_the_modules_that_compute_import_nothing_heavy():
    code = f"""
import sys, importlib
for name in {sorted(COMPUTE)}:
    importlib.import_module("svae_jax." + name)
heavy = {{"tensorflow", "tensorflow_datasets", "orbax", "clu", "ml_collections"}} & set(sys.modules)
assert not heavy, heavy
"""
    # Flax itself imports Orbax where it is installed; so it is hidden, as on a machine without it.
    hide = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "orbax", "orbax.checkpoint", "clu",
             "ml_collections"):
    sys.modules[name] = None
"""
    check = code.replace("& set(sys.modules)", "& {n for n, m in sys.modules.items() if m}")
    subprocess.run([sys.executable, "-c", hide + check], check=True, timeout=120)


def test_the_loop_can_be_read_in_one_sitting():
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 250
