"""The order of the rooms: imports point only downward, and the heavy ones stand in one place."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "svae_jax"

# Rooms from the top down: a module imports only from its own room and from rows below.
ROWS = [
    {"__main__", "main", "fit_sampler", "evaluate", "sample", "encode", "explore"}
    | {"pack", "unpack"},
    {"command_line"},
    {"training", "analysis"},
    {"sampler_config", "identity"},
    {"config", "sweeps"},
    {"sizes"},
    {"evaluation"},
    {"samplers"},
    {"recipe"},
    {"model", "data", "run"},
    {"likelihoods"},
    {"latents", "devices", "pixels", "image_files"},
    {"config_files", "files", "seeds"},
    {"errors", "terminal"},
]
# What computes touches no files, and runs where nothing but JAX and Flax is installed.
COMPUTE = {
    "latents", "likelihoods", "pixels", "model", "recipe",
    "devices/batches", "devices/compiler", "devices/sharding", "evaluation/steps",
    "evaluation/grids", "evaluation/per_image", "evaluation/previews", "evaluation/estimates",
    "evaluation/quality/frechet",
    "evaluation/quality/kernel", "evaluation/quality/neighbours", "evaluation/quality/wasserstein",
    "samplers/aggregate", "samplers/base", "samplers/flow", "samplers/gaussian",
    "samplers/kronecker", "samplers/prior", "samplers/velocity", "training/flat", "training/step",
}  # fmt: skip
ALLOWED_IN_COMPUTE = {"jax", "flax", "optax", "numpy", "jaxtyping", "dm_pix", "svae_jax"}
PURE_STDLIB = {
    "collections", "dataclasses", "functools", "itertools", "math", "re", "typing",
}  # fmt: skip
# Heavy packages, and the only places that import them.
HOMES = {
    "orbax": {"run/checkpoint"},
    "tensorflow_datasets": {"data/splits", "data/sources"},
    "ml_collections": {"config", "sizes", "sampler_config", "identity", "analysis", "main"}
    | {"fit_sampler"}
    | {"command_line", "training/job", "training/loop"},
    "tensorflow": {"devices/lazy_tensorflow"},
    "tensorboard": {"run/events"},
    "torch": {"evaluation/quality/features"},
    "clu": {"evaluation/metrics", "training/metrics"},
    "PIL": {"data", "image_files"},
    "filelock": {"files"},
    "sklearn": {"samplers/mixture"},
    "jinja2": {"analysis/report"},
    "matplotlib": {"analysis/figures", "analysis/report"},
}


def _name(path):
    """The module without its suffix, such as `run/checkpoint/arrays`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def _room(path):
    return _name(path).partition("/")[0]


def _is_in(path, places):
    return any(_name(path) == place or _name(path).startswith(f"{place}/") for place in places)


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


def test_the_page_tells_this_order():
    page = (PACKAGE / "README.md").read_text().partition("## Modules")[2]
    told = [set() for _ in ROWS]
    for number, names in re.findall(r"^\| (\d+) \| (`[^|]*`) \|", page, re.MULTILINE):
        told[int(number) - 1] |= set(re.findall(r"`(\w+)(?:\.py|/)`", names))
    assert told == [rooms - {"__main__"} for rooms in ROWS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_downward(path):
    row = {room: depth for depth, rooms in enumerate(ROWS) for room in rooms}
    for package, room in _imports(path):
        if package == "svae_jax" and room != _room(path):
            assert row[room] > row[_room(path)], f"{path.name} imports svae_jax.{room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_have_one_home(path):
    for package, _ in _imports(path):
        home = HOMES.get(package)
        assert home is None or _is_in(path, home), f"{path.name} imports {package}"
        if _is_in(path, COMPUTE):
            known = package in ALLOWED_IN_COMPUTE | PURE_STDLIB
            assert known, f"{path.name} imports {package}"
        assert package != "__future__"


def _python(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_modules_that_compute_run_without_the_heavy_packages():
    hidden = ["tensorflow", "tensorflow_datasets", "orbax", "clu", "ml_collections"]
    modules = ["svae_jax." + name.replace("/", ".") for name in sorted(COMPUTE)]
    _python(f"""
import importlib, sys
# Flax imports Orbax where it is installed; None makes each import fail, as if it were not.
sys.modules |= dict.fromkeys({hidden!r})
for name in {modules!r}:
    importlib.import_module(name)
""")


def test_the_latents_import_neither_flax_nor_tensorflow():
    _python("""
import sys
from svae_jax import latents
assert not {"flax", "optax", "tensorflow"} & set(sys.modules)
""")
