"""The wheel and the source distribution: the quick start without a checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from svae_jax import config_files
from tests.command_line import ROOT

_SOURCES = (
    "svae_jax", "configs", "tests", "experiments", "pyproject.toml", "setup.py", "setup.cfg",
    "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff",
)  # fmt: skip
TINY = [
    "--config.dataset.split=train[:60]", "--config.dataset.eval_split=test[:20]",
    "--config.batch_size=20", "--config.num_steps=2", "--config.latent.maps=4",
    "--config.model.encoder=5x5/4/s2 5x5/4/s2", "--config.model.decoder=3x3/4 3x3/4 5x5/image/s4",
]  # fmt: skip


def _python(*arguments, **options):
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, **options
    )
    assert found.returncode == 0, found.stderr + found.stdout
    return found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source distribution, and the wheel that is built from it."""
    # A build writes into the checkout.
    checkout = tmp_path_factory.mktemp("checkout")
    for name in _SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    out = tmp_path_factory.mktemp("dist")
    _python("-m", "build", "--no-isolation", "--outdir", out, checkout)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the installed wheel alone; what it depends on is that of the environment."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    _python(*install, wheel)
    return target


def test_the_wheel_holds_every_file_of_the_package(installed):
    def files(folder):
        found = (path for path in folder.rglob("*") if path.is_file())
        names = (path.relative_to(folder).as_posix() for path in found)
        return {name for name in names if not name.endswith((".pyc", ".md"))}

    configs = {f"configs/{name}" for name in files(ROOT / "configs")}
    assert files(installed / "svae_jax") == files(ROOT / "svae_jax") | configs
    assert {"configs/shapes.py", "analysis/report/page.html", "py.typed"} <= files(
        installed / "svae_jax"
    )


def test_the_quick_start_works_without_a_checkout(installed, tmp_path):
    place = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(installed)}}
    found = _python("-c", "import svae_jax as s; print(s.__file__, s.__version__)", **place)
    assert found.split() == [str(installed / "svae_jax" / "__init__.py"), "0.1.0"]
    command = ("-m", "svae_jax.main", "--config=shapes:mvn", "--workdir=runs/shapes")
    result = json.loads(_python(*command, *TINY, **place))
    assert result["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_the_source_distribution_holds_what_builds_and_tests_it(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*_SOURCES} <= names
    assert {f"configs/{name}.py" for name in config_files.names()} <= names
    assert {"svae_jax/HOWTO.md", "svae_jax/README.md", "tests/test_howto.py"} <= names
