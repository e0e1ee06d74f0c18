"""Several processes on this machine: they train as one, stop as one, and end as one."""

import contextlib
import functools
import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from svae_jax.devices import processes
from svae_jax.errors import UserError
from svae_jax.run import workdir
from tests import command_line
from tests.run.test_checkpoint import offered
from tests.run.test_survival import fingerprint, rows

LIMIT = 600  # seconds for any process; an idle machine takes ten


@pytest.fixture
def start_pair(start, tiny_config, tmp_path):
    """Starts two processes that train as one, in the directory `run`; `options` go to rank 1."""

    def begin(*arguments, options=(), before=""):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        return [
            start(
                *command_line.arguments(tiny_config, tmp_path / "run"),
                f"--distributed=localhost:{port},2,{rank}",
                *arguments,
                *(options if rank == 1 else ()),
                before=before,
                **command_line.host_devices(1),
            )
            for rank in range(2)
        ]

    return begin


def _wait_for_a_step(process):
    line = process.stderr.readline()
    while line and not line.startswith("step "):
        line = process.stderr.readline()
    assert line, process.communicate()
    return int(re.match(r"step (\d+)/", line)[1])


def _newest(run):
    return max(offered(run / "checkpoints"))


# Tells of every set of images that is decoded, and how many rows of a batch are read. Its steps are
# slow, so that a signal comes before the last one.
TOLD = """
import time
from svae_jax.data import splits
from svae_jax.training import feed
decode, rows, make = splits.decode, feed._rows, feed.make
def told(*args, **kwargs):
    print("decoded", flush=True)
    return decode(*args, **kwargs)
class Rows:
    def __init__(self, images):
        self.images, self.shape = rows(images), rows(images).shape
    def __getitem__(self, chosen):
        print("read", len(chosen), flush=True)
        return self.images[chosen]
def slow(*args):
    run = make(*args)
    return lambda *args: (time.sleep(0.2), run(*args))[1]
splits.decode, feed._rows, feed.make = told, Rows, slow
"""


def test_two_processes_train_stop_and_resume_as_one(start, start_pair, tiny_config, tmp_path):
    """Bit by bit as one process with two devices, to which the run moves in between, and back."""
    tiny_config.update(num_steps=25, log_every=1, eval_every=1000, sample_every=1000)
    tiny_config.checkpoint.every = 1000
    tiny_config.dataset.cache_dir = str(tmp_path / "cache")
    tiny_config.dataset.resident_share = 0.0
    run, whole = tmp_path / "run", tmp_path / "whole"

    def start_alone(directory, before=""):
        arguments = command_line.arguments(tiny_config, directory)
        return [start(*arguments, before=before, **command_line.host_devices(2))]

    saved = 0
    for begin, signalled, number in (
        (start_pair, 1, signal.SIGTERM),
        (start_pair, 0, signal.SIGINT),
        (functools.partial(start_alone, run), 0, signal.SIGTERM),
    ):
        running = begin(before=TOLD)
        assert _wait_for_a_step(running[0]) == saved + 1
        running[signalled].send_signal(number)
        outputs = [process.communicate(timeout=LIMIT) for process in running]
        assert {process.returncode for process in running} == {128 + number}, outputs
        now = _newest(run)
        name = signal.Signals(number).name
        assert {stderr.splitlines()[-1] for _, stderr in outputs} == {
            f"stopped by {name}: saved at step {now}; the same command continues"
        }
        assert now > saved
        told = [line for stdout, _ in outputs for line in stdout.splitlines()]
        # Each split once; and each device's rows once, by the process that has the device.
        assert told.count("decoded") == (0 if saved else 2)
        assert {line for line in told if line.startswith("read")} == {"read 6"}
        saved = now

    (stdout, stderr), (other, _) = (process.communicate(timeout=LIMIT) for process in start_pair())
    result = json.loads(stdout[stdout.index("{\n") :])  # Gloo, too, writes to stdout
    assert (result["device"]["count"], result["device"]["processes"]) == (2, 2), stderr
    assert "{" not in other
    command_line.finish(start_alone(whole)[0])
    assert fingerprint(run) == fingerprint(whole)
    assert rows(run) == rows(whole)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(
    start_pair, tiny_config, tmp_path
):
    tiny_config.update(num_steps=100_000, log_every=1, eval_every=100_000, sample_every=100_000)
    tiny_config.checkpoint.every = 1
    first, second = start_pair("--heartbeat_timeout=10")
    while _wait_for_a_step(first) < 5:  # saves take turns with steps: one is whole by now
        pass
    second.kill()
    started = time.monotonic()
    _, stderr = first.communicate(timeout=LIMIT)
    assert time.monotonic() - started < 10 + 20
    assert first.returncode == 1
    *steps, last = stderr.splitlines()
    died = rf"error: process 1 on {re.escape(socket.gethostname())} has died; the same command"
    assert re.match(died, last)
    assert all(line.startswith("step ") for line in steps), stderr

    saved = _newest(tmp_path / "run")
    assert saved > 0
    first, second = start_pair("--heartbeat_timeout=10")
    assert _wait_for_a_step(first) == saved + 1
    first.kill()
    started = time.monotonic()
    second.communicate(timeout=LIMIT)  # JAX aborts it, in words of its own
    assert time.monotonic() - started < 10 + 20
    assert second.returncode not in (0, None)


def _no_lock(run, options):
    return workdir.locked(run), "is in use by process"


def _no_data(run, options):
    options.append("--config.dataset.data_dir=/nowhere")
    return contextlib.nullcontext(), "dataset.data_dir='/nowhere'"


def _no_room(run, options):
    (run / "metrics.jsonl").mkdir()  # found when all are about to train
    return contextlib.nullcontext(), "Is a directory"


@pytest.mark.parametrize(
    "refusal", [_no_lock, _no_data, pytest.param(_no_room, marks=pytest.mark.slow)]
)
def test_a_refusal_in_one_process_ends_all_with_the_same_line(start_pair, tmp_path, refusal):
    (run := tmp_path / "run").mkdir()
    options = []
    held, message = refusal(run, options)
    with held:
        pair = start_pair(options=options)
        until = time.monotonic() + LIMIT
        while all(process.poll() is None for process in pair) and time.monotonic() < until:
            time.sleep(0.1)
        outputs = [process.communicate(timeout=10) for process in pair]
    assert [process.returncode for process in pair] == [2, 2], outputs
    (line, other) = (stderr for _, stderr in outputs)
    assert line == other
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert message in line


# One process, and the others made up.


@pytest.fixture
def store(monkeypatch):
    """The key-value store of two processes, of which this is process 0."""
    values = {}

    class Client:
        def key_value_set(self, key, value, allow_overwrite=False):
            if key in values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            values[key] = value

        def key_value_dir_get(self, folder):
            return [(key, value) for key, value in values.items() if key.startswith(folder)]

    state = processes._service()
    for name, value in {"client": Client(), "process_id": 0, "num_processes": 2}.items():
        monkeypatch.setattr(state, name, value)
    return values


def test_only_a_process_that_gives_no_new_sign_counts_as_dead(store, monkeypatch):
    now = 0.0
    monkeypatch.setattr(processes.time, "monotonic", lambda: now)
    pulse = processes._Pulse()
    store["svae_jax/beats/0"] = "1 process 0 on here"
    now = 9.0
    assert pulse.dead(10.0) is None
    store["svae_jax/beats/0"] = "2 process 0 on here"
    store["svae_jax/beats/1"] = "1 process 1 on there"
    now = 18.0
    assert pulse.dead(10.0) is None
    store["svae_jax/beats/0"] = "left"
    now = 27.0
    assert pulse.dead(10.0) is None
    now = 40.0
    assert pulse.dead(10.0) == "process 1 on there"


def test_the_first_to_end_decides_how_all_end(store, monkeypatch, capsys):
    class Exited(BaseException):
        pass

    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(processes.os, "_exit", leave)
    store["svae_jax/end/first"] = json.dumps(["error: of the other", 2])
    store["svae_jax/read/1"] = ""
    with pytest.raises(Exited) as exited:
        processes._Watch(10).end("error: of this one", 1)
    assert exited.value.args == (2,)
    assert capsys.readouterr().err == "error: of the other\n"


def test_processes_that_are_given_different_things_are_refused(monkeypatch):
    facts = {"options": {"seed": 1}, "images": [48, 20]}
    processes.check_same(facts)  # one process is always like itself
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    gather = processes.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda mine: np.stack([mine, mine]))
    processes.check_same(facts)
    monkeypatch.setattr(
        gather, "process_allgather", lambda mine: np.stack([mine, mine + np.arange(2)])
    )
    with pytest.raises(UserError, match="differ in: images; give"):
        processes.check_same(facts)
