"""What all commands share, without a training."""

import pathlib
import subprocess
import sys
import tomllib

import jax
import pytest
from absl import flags
from ml_collections import config_flags

import svae_jax
from svae_jax import __main__ as listing
from svae_jax import command_line
from svae_jax.data import cache
from svae_jax.errors import UserError
from tests.command_line import ROOT


def _command(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", name, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_the_package_knows_its_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert svae_jax.__version__ in (project["version"], "unknown")


def test_the_package_lists_every_command():
    files = (ROOT / "svae_jax").glob("*.py")
    commands = {file.stem for file in files if "    command_line.run(" in file.read_text()}
    assert set(listing.COMMANDS) == commands
    found = _command("svae_jax", "--help")
    assert found.returncode == 0
    assert all(f"python -m svae_jax.{name} " in found.stdout for name in commands)
    assert _command("svae_jax", "train").returncode == 2


MISSING = {
    "svae_jax.main": "--workdir and --config are missing, as in "
    "python -m svae_jax.main --config=shapes:best --workdir=runs/shapes",
    "svae_jax.main --config=shapes:best": "--workdir is missing, as in python -m svae_jax.main ",
    "svae_jax.evaluate": "--workdir is missing, as in python -m svae_jax.evaluate --workdir=",
    "experiments.rates": "--workdir is missing, as in python -m experiments.rates --config=",
}


@pytest.mark.parametrize(("command", "message"), MISSING.items(), ids=MISSING)
def test_a_flag_that_is_missing_is_shown_in_an_example(command, message):
    found = _command(*command.split())
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: {message}")
    assert found.stderr.count("\n") == 1


MEANT = {
    "batch_size": "--batch_size is a field of the configuration: --config.batch_size",
    "height": r"--height is .*: --config.dataset.height or --config.latent.height",
    "frobs": "Unknown command line flag 'frobs'",
}


@pytest.mark.parametrize(("flag", "message"), MEANT.items(), ids=MEANT)
def test_a_field_without_its_prefix_is_named(flag, message):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", values)
    with pytest.raises(UserError, match=message):
        command_line.parse(values, ["", "--config=shapes", f"--{flag}=3"])


@pytest.mark.parametrize("name", listing.COMMANDS)
def test_help_has_an_example(name):
    found = _command(f"svae_jax.{name}", "--help")
    assert found.returncode == 0
    assert f"    python -m svae_jax.{name} --" in found.stdout
    assert "ConfigDict instance" not in found.stdout
    assert "(default: 'None')" not in found.stdout


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1e3"])
def test_a_seed_beyond_the_range_is_one_line(seed):
    found = _command("svae_jax.sample", f"--seed={seed}", "--workdir=a", "--out=b.npz")
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: flag --seed={seed}: ")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["/data/a:b/images.py", "a:b/images.py:lowrank,rank=2"])
def test_a_configuration_below_a_colon_is_refused(path):
    with pytest.raises(UserError, match=f"--config={path}: a path is cut at its first colon"):
        command_line.load_config(path)


def test_options_may_hold_a_path_s_letters():
    config, _ = command_line.load_config(f"{ROOT}/configs/shapes.py:lowrank,rank=2")
    assert config.latent.rank == 2


def test_a_missing_platform_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    line, code = command_line.ending(RuntimeError("Unable to initialize backend 'cuda': none"))
    assert code == 2
    assert line.startswith("error: JAX_PLATFORMS=cuda: Unable to initialize backend 'cuda'")
    assert command_line.ending(RuntimeError("a bug")) is None
    assert command_line.ending(AssertionError("a bug")) is None


def backends():
    raise AssertionError  # as JAX does where a plug-in has failed


def test_a_platform_whose_plug_in_fails_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(AssertionError) as error:
        backends()
    line, code = command_line.ending(error.value)
    assert code == 2
    assert line.startswith("error: JAX_PLATFORMS=cuda: there is no such device")


def test_names_with_commas_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lowrank,rank=2", "a", "b"):
        (tmp_path / name).mkdir()
    given = ["lowrank,rank=2", "a,b", f"{tmp_path}/lowrank,rank=2", "gone"]
    assert command_line.paths(given) == ["lowrank,rank=2", "a", "b", given[2], "gone"]


CONFIGS = {
    "x = 1": "has no attribute 'get_config'; a configuration is a Python file with get_config",
    "def get_config(arg=''): return {'seed': 1}": "get_config returns a dict, not a ConfigDict",
    "import ml_collections\ndef get_config(arg=''):\n    return ml_collections.ConfigDict().a": (
        "own.py, line 3: "
    ),
}


@pytest.mark.parametrize(("code", "message"), CONFIGS.items(), ids=["no function", "dict", "bug"])
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, code, message):
    path = tmp_path / "own.py"
    path.write_text(code)
    # In a process of its own: a file is run in the module of the one before.
    found = _command("svae_jax.main", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert found.returncode == 2
    assert found.stderr.startswith("error: --config")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--workdir", "config"], ["--workdir=config"]])
def test_a_value_called_config_is_no_flag(arguments):
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "", values)
    argv = ["", *arguments, f"--config={ROOT}/configs/shapes.py"]
    config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    command_line.parse(values, argv)
    assert values.workdir == "config"


def test_two_configurations_are_refused():
    with pytest.raises(UserError, match="--config is given twice"):
        command_line.load_config(f"{ROOT}/configs/shapes.py:mvn", ["--config=configs/shapes.py"])


def test_a_name_with_a_line_break_does_not_break_the_line():
    line, _ = command_line.ending(UserError("a\nb.png is no picture"))
    assert line == r"error: a\nb.png is no picture"


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 8"), MemoryError("8 GiB")]
)
def test_too_little_memory_is_one_line(error):
    for given, cure in ({}, command_line._MORE_MEMORY), ({"memory_cure": "eat"}, "eat"):
        line, code = command_line.ending(error, **given)
        assert code == 2
        assert line.startswith("error: too little memory (")
        assert line.endswith(f"); {cure}")
        assert "\n" not in line


_EVALUATE = """
from svae_jax import command_line, evaluate
from svae_jax.analysis import evaluating, tables
from svae_jax.errors import UserError

def one(path, settings, data_dir):
    if path.startswith("bad"):
        raise UserError(f"{path} is no workdir")
    return path

evaluating.evaluate, tables.evaluations = one, repr
command_line.run(evaluate.main)
"""


def test_a_run_that_cannot_be_evaluated_does_not_hold_up_the_others():
    runs = ["good", "bad", "better", "bad2"]
    command = [sys.executable, "-c", _EVALUATE, *(f"--workdir={run}" for run in runs)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 2
    assert found.stdout == "['good', 'better']\n"
    assert found.stderr == "error: bad is no workdir; bad2 is no workdir\n"


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_a_place_is_asked_for(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", _no_home)
    with pytest.raises(UserError, match=r"set dataset.cache_dir or the variable XDG_CACHE_HOME"):
        cache.home()


def test_without_a_home_a_command_goes_without_the_cache_of_programs(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", _no_home)
    before = jax.config.jax_compilation_cache_dir
    command_line.keep_programs()
    assert jax.config.jax_compilation_cache_dir == before
