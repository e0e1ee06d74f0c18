"""The command line, as a user meets it."""

import json

import pytest

from tests import command_line
from tests.command_line import finish, run


@pytest.fixture
def tiny_args(tiny_config, tmp_path):
    """The arguments that turn the default configuration into the tiny one."""
    return command_line.arguments(tiny_config, tmp_path / "run")


def test_help_explains_itself():
    code, stdout, _ = run("--help")
    assert code == 0
    for word in ("--config", "--workdir", "lowrank", "result.json", "configs/shapes.py"):
        assert word in stdout


def test_a_run_prints_lines_to_stderr_and_its_result_to_stdout(tiny_args, tmp_path):
    code, stdout, stderr = run(
        *tiny_args, JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS=""
    )  # as users run it
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    lines = stderr.splitlines()
    # No chatter of TensorFlow, Orbax or JAX: nothing but progress.
    assert all(line.startswith("step ") for line in lines), stderr
    assert sum("eval: elbo" in line for line in lines) == 2
    assert "ETA" in stderr


CASES = {
    # Stands for all the values that test_config has refused.
    "d=-3": (["--config.latent.height=-3"], "latent.height must be a positive integer"),
    "devices": (["--config.batch_size=10"], "batch_size must be a multiple of the 4 devices"),
    "field": (["--config.latent.mapz=3"], "did you mean latent.maps"),
    "type": (["--config.batch_size=many"], "--config.batch_size=many"),
    "flag": (["--work=x"], "Unknown command line flag 'work'"),
    "argument": (["train"], "unexpected argument 'train'"),
    "data": (
        ["--config.dataset.name=cifr10", "--config.dataset.data_dir="],
        "did you mean cifar10",
    ),
    "workdir": (["--workdir=/proc/nowhere"], "--workdir=/proc/nowhere cannot be written"),
    "config": (["--config=configs/cifar11.py"], "configs/cifar11.py"),
    "section": (["--config.objective={}"], "config.objective lacks objective.beta, "),
    "platform": ([], "JAX_PLATFORMS=abacus: Unable to initialize backend"),
    "option": (["--config=configs/cifar10.py:lowrank,r=2"], "no option 'r' for lowrank"),
    "distributed": (["--distributed=here"], "--distributed=here must be 'auto' or HOST:PORT"),
}


def _words(given, args):
    """A case's own --config stands first and alone: it may be given once, before its fields."""
    if not any(word.startswith("--config=") for word in args):
        return [*given, *args]
    return [*args, *(word for word in given if not word.startswith("--config="))]


def test_bad_input_gets_one_line_and_a_non_zero_exit(start, tiny_args, tmp_path):
    """All cases at once, since each process starts for seconds."""
    pending = list(CASES.items())
    while pending:
        chunk, pending = pending[:4], pending[4:]
        processes = [
            start(
                *_words(tiny_args, args),
                **command_line.host_devices(4),
                JAX_PLATFORMS="abacus" if name == "platform" else "cpu",
            )
            for name, (args, _) in chunk
        ]
        for process, (name, (_, message)) in zip(processes, chunk, strict=True):
            code, stdout, stderr = finish(process)
            assert code == 2, (name, stderr)
            assert stdout == "", name
            assert stderr.startswith("error: "), (name, stderr)
            assert stderr.count("\n") == 1, (name, stderr)
            assert message in stderr, (name, stderr)
    assert not list(tmp_path.glob("run/*"))
