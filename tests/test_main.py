"""The command line, as a user meets it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from svae_jax import checkpoint

ROOT = Path(__file__).parents[1]


def _command(*args):
    return [sys.executable, "-m", "svae_jax.main", *args]


def _run(*args, **environment):
    return subprocess.run(
        _command(*args),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def tiny_args(tiny_config):
    """The arguments that turn the default configuration into the tiny one."""
    from configs import shapes
    from svae_jax.config import flatten

    default, tiny = (flatten(c.to_dict()) for c in (shapes.get_config(), tiny_config))
    return [
        "--config=configs/shapes.py:lowrank",
        *(f"--config.{k}={v}" for k, v in tiny.items() if v != default[k]),
    ]


def test_help_explains_itself():
    done = _run("--help")
    for word in ("--config", "--workdir", "lowrank", "result.json", "configs/shapes.py"):
        assert word in done.stdout


def test_a_run_prints_lines_to_stderr_and_its_result_to_stdout(tiny_args, tmp_path):
    done = _run(*tiny_args, f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    lines = done.stderr.splitlines()
    # No chatter of TensorFlow, Orbax or JAX: nothing but progress.
    assert all(line.startswith("step ") for line in lines), done.stderr
    assert sum("eval: elbo" in line for line in lines) == 2
    assert "ETA" in done.stderr


CASES = {
    "d=-3": (["--config.latent.height=-3"], "latent.height must be a positive integer"),
    "N=0": (["--config.latent.maps=0"], "latent.maps must be a positive integer, got maps=0"),
    "rank": (["--config.latent.rank=4"], "latent.rank must be between 1 and"),
    "beta": (["--config.objective.beta=nan"], "objective.beta must be a finite number"),
    "rate": (["--config.optimizer.learning_rate=0"], "optimizer.learning_rate must be"),
    "posterior": (["--config.latent.name=gauss"], "latent.name must be one of vector"),
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
    "option": (["--config=configs/cifar10.py:lowrank,r=2"], "no option 'r' for lowrank"),
    "distributed": (["--distributed=here"], "--distributed=here must be 'auto' or HOST:PORT"),
}


def test_bad_input_gets_one_line_and_a_non_zero_exit(tiny_args, tmp_path):
    """All cases at once, since each process starts for seconds."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    pending = list(CASES.items())
    while pending:
        chunk, pending = pending[:4], pending[4:]
        processes = [
            subprocess.Popen(
                _command(*tiny_args, f"--workdir={tmp_path}/run", *args),
                cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _, (args, _) in chunk
        ]  # fmt: skip
        for process, (name, (_, message)) in zip(processes, chunk, strict=True):
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 2, (name, stderr)
            assert stdout == "", name
            assert stderr.startswith("error: "), (name, stderr)
            assert stderr.count("\n") == 1, (name, stderr)
            assert message in stderr, (name, stderr)
    assert not list(tmp_path.glob("run/*"))


def test_two_processes_train_as_one(tiny_args, tmp_path):
    """Two processes of two devices each: one workdir, and the numbers of a single process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            _command(
                *tiny_args, f"--workdir={tmp_path}/two", f"--distributed=localhost:{port},2,{i}"
            ),
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    stdout = outputs[0][0]  # Gloo, too, writes to it
    result = json.loads(stdout[stdout.index("{\n") :])
    assert result["device"]["count"] == 4
    assert result["device"]["processes"] == 2
    assert "{" not in outputs[1][0]
    alone = _run(*tiny_args, f"--workdir={tmp_path}/one")
    metrics = json.loads(alone.stdout)["metrics"]
    for name, value in metrics.items():
        assert result["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert checkpoint.load(tmp_path / "two" / "checkpoints").step == 8
