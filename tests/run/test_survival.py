"""What a run survives: kills, damaged files, full disks, other machines, files that mean harm."""

import contextlib
import functools
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import svae_jax
from svae_jax import files as file_lib
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds, previews
from svae_jax.run import checkpoint, interrupt, workdir
from svae_jax.training import feed, loop
from tests import command_line
from tests.run.test_checkpoint import DAMAGE, NEEDED, Bomb, damage, offered


def rows(directory):
    """The rows of metrics.jsonl, but for the one number that is of the clock."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines
    ]


def fingerprint(directory, step=None):
    """That of the newest step, or of another one, whatever stands beside it."""
    checkpoints = directory / "checkpoints"
    if step is None:
        return checkpoint.fingerprint(checkpoint.load(checkpoints).state)
    with tempfile.TemporaryDirectory() as alone:
        shutil.copytree(checkpoints / str(step), Path(alone) / str(step))
        return checkpoint.fingerprint(checkpoint.load(alone).state)


def assert_curves_are_those_of(directory, whole):
    """Each step once, in metrics.jsonl and in TensorBoard; and the same numbers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert rows(directory) == rows(whole)
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    shown = {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    for tag in ("train/loss", "train/kl", "eval/elbo"):
        assert shown[tag] == [row["step"] for row in rows(whole) if tag in row]
    for tag in ("samples", "samples_gaussian", "reconstructions"):
        steps = sorted(int(path.stem) for path in (whole / tag).iterdir())
        assert sorted(int(path.stem) for path in (directory / tag).iterdir()) == steps
        assert shown[tag] == steps


# Kills.

SYNCHRONOUS = """
from svae_jax.run.checkpoint import Checkpointer
save = Checkpointer.save
def save_and_wait(self, *args, **kwargs):
    save(self, *args, **kwargs)
    self.wait()
Checkpointer.save = save_and_wait
"""


def _wait_until(process, rng, directory):
    """Until a random instant: while the run restores and begins, or some steps later."""
    if rng.random() < 0.25:
        owner = directory / ".lock.owner"
        while process.poll() is None:
            if owner.exists() and f"process {process.pid} " in owner.read_text():
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.5))
    else:
        for _ in range(rng.randint(1, 10)):
            line = process.stderr.readline()
            assert line.startswith("step "), line + process.communicate()[1]
        time.sleep(rng.uniform(0.0, 0.1))


def _survives(start, config, directory, *, kills, before, seed):
    """Kills a run so many times, goes on each time, and compares it with one left in peace."""
    rng = random.Random(seed)
    config.update(num_steps=25 * kills, log_every=2, eval_every=20, sample_every=40)
    config.optimizer.ema_decay = 0.9
    config.checkpoint.update(every=4, keep=3)
    broken, whole = directory / "broken", directory / "whole"
    args = command_line.arguments(config, broken)
    newest = []
    for _ in range(kills):
        process = start(*args, before=before)
        _wait_until(process, rng, broken)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, stderr  # it was under way
        steps = offered(broken / "checkpoints") if (broken / "checkpoints").exists() else []
        newest.append((max(steps, default=0), {step: fingerprint(broken, step) for step in steps}))
    code, _, stderr = command_line.finish(start(*args, before=before))
    assert code == 0, stderr
    config.checkpoint.keep = 1_000_000
    loop.train(config, whole)
    reached = [step for step, _ in newest]
    assert reached == sorted(reached)
    assert len(set(reached)) > kills // 2  # most kills fell into training
    for step, found in {k: v for _, steps in newest for k, v in steps.items()}.items():
        assert found == fingerprint(whole, step), step
    assert not (broken / "checkpoints" / "quarantine").exists()
    assert fingerprint(broken) == fingerprint(whole)
    assert_curves_are_those_of(broken, whole)
    results = [file_lib.read_json(d / "result.json")["metrics"] for d in (broken, whole)]
    assert results[0] == results[1]


@pytest.mark.usefixtures("optimised", "fresh_programs")
def test_killed_twice_a_run_ends_in_the_same_bits(start, tiny_config, tmp_path):
    _survives(start, tiny_config, tmp_path, kills=2, before="", seed=3)


@pytest.mark.soak
@pytest.mark.parametrize("before", ["", SYNCHRONOUS], ids=["asynchronous", "synchronous"])
def test_killed_at_random_a_run_ends_in_the_same_bits(start, tiny_config, tmp_path, before):
    _survives(start, tiny_config, tmp_path, kills=20, before=before, seed=len(before))


# Damaged files, through `train`.


@pytest.fixture
def begun(monkeypatch):
    """The steps at which runs of one configuration began; compiled once, and not evaluated."""
    make, kept, found = feed.make, [], []

    def once(*args):
        if not kept:
            kept.append(make(*args))
        fresh = True

        def train_steps(state, totals, at, most):
            nonlocal fresh
            if fresh:
                found.append(at)
                fresh = False
            return kept[0](state, totals, at, most)

        return train_steps

    monkeypatch.setattr(feed, "make", once)
    monkeypatch.setattr(bounds, "held_out", lambda *args, **kwargs: {"elbo": -1.0})
    monkeypatch.setattr(previews, "draw", lambda *args: {})
    return found


def _largest_array(step_directory):
    """The file that holds it, and where; which file is what differs from save to save."""
    with tempfile.TemporaryDirectory() as alone:
        shutil.copytree(step_directory, Path(alone) / step_directory.name)
        leaves = jax.tree.leaves(checkpoint.load(alone).state)
    content = max(leaves, key=lambda leaf: leaf.nbytes).tobytes()
    for file in step_directory.glob("state/**/d/*"):
        if content in (data := file.read_bytes()):
            return file, data.index(content)
    raise AssertionError("the arrays are not stored as they are")


def _damage_array(file, place, how):
    data = file.read_bytes()
    if how == "flip":
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    elif how == "truncate":
        file.write_bytes(data[: place + 1])
    else:
        damage(file, how)


def _cases(step_directory):
    """Each file that is needed with each damage, and each other file with one of them in turn."""
    needed = [step_directory / name for name in NEEDED]
    arrays, place = _largest_array(step_directory)
    files = [path for path in sorted(step_directory.rglob("*")) if path.is_file()]
    others = [path for path in files if path not in (*needed, arrays)]
    assert len(others) > 4
    for how in DAMAGE:
        yield arrays, how, functools.partial(_damage_array, place=place, how=how), (4,)
        for file in needed:
            yield file, how, functools.partial(damage, how=how), (4,)
    for file, how in zip(others, itertools.cycle(DAMAGE), strict=False):
        yield file, how, functools.partial(damage, how=how), (4, 6)


def test_a_damaged_file_costs_at_most_the_newest_step(tiny_config, tmp_path, begun):
    tiny_config.update(log_every=1, eval_every=2)
    loop.train(tiny_config, tmp_path / "whole")
    tiny_config.num_steps = 6
    saved = tmp_path / "saved"
    loop.train(tiny_config, saved)
    tiny_config.num_steps = 8
    for file, how, apply, expected in _cases(saved / "checkpoints" / "6"):
        case = file.relative_to(saved), how
        directory = Path(shutil.copytree(saved, tmp_path / "damaged"))
        apply(directory / case[0])
        loop.train(tiny_config, directory)
        assert begun[-1] in expected, case
        assert (directory / "checkpoints" / "quarantine" / "6").exists() == (begun[-1] == 4), case
        assert offered(directory / "checkpoints") == [4, 6, 8], case
        assert fingerprint(directory) == fingerprint(tmp_path / "whole"), case
        assert rows(directory) == rows(tmp_path / "whole"), case
        shutil.rmtree(directory)
    assert 6 in begun  # what nobody needs condemns nothing


def test_a_torn_row_of_a_killed_run_is_written_anew(tiny_config, tmp_path, begun):
    tiny_config.log_every = 1
    loop.train(tiny_config, tmp_path / "whole")
    tiny_config.num_steps = 5
    saved = tmp_path / "saved"
    loop.train(tiny_config, saved)
    shutil.rmtree(saved / "checkpoints" / "5")  # killed before its last save: back to step 4
    tiny_config.num_steps = 8
    lines = (saved / "metrics.jsonl").read_bytes()
    last = len(lines) - 1 - lines[:-1].rindex(b"\n")
    for missing in (1, 2, last // 2, last - 1):
        directory = Path(shutil.copytree(saved, tmp_path / f"without_{missing}"))
        (directory / "metrics.jsonl").write_bytes(lines[:-missing])
        (event_file,) = directory.glob("events.out.tfevents.*")
        event_file.write_bytes(event_file.read_bytes()[:-missing])
        loop.train(tiny_config, directory)
        assert begun[-1] == 4
        assert rows(directory) == rows(tmp_path / "whole")


# As a user meets it.


def _error(outcome):
    """The one line of a run that was refused."""
    code, stdout, stderr = outcome
    assert code == 2, stderr
    assert stdout == ""
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr


@contextlib.contextmanager
def _mounted(directory, *options):
    directory.mkdir(exist_ok=True)
    mount = ["mount", *options, str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(start, tiny_config, tmp_path):
    disk = tmp_path / "disk"
    with _mounted(disk, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        tiny_config.update(num_steps=3000, log_every=100, eval_every=3000, sample_every=3000)
        args = command_line.arguments(tiny_config, disk / "run")
        process = start(*args)
        for _ in range(2):
            assert process.stderr.readline().startswith("step ")
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        code, stdout, stderr = command_line.finish(process)
        assert (code, stdout) == (2, "")
        # Metrics or a save fail first; if both do, the other one is told before.
        told = [line for line in stderr.splitlines() if not line.startswith("step ")]
        assert re.match(r"error: .*[Nn]o space left on device", told[-1])
        assert "Traceback" not in stderr
        steps = offered(disk / "run" / "checkpoints")
        assert len(steps) == 3
        assert all(fingerprint(disk / "run", step) for step in steps)
        assert not list((disk / "run" / "checkpoints").glob("*tmp*"))
        with pytest.raises(UserError, match=r"[Nn]o space left"):
            loop.train(tiny_config, disk / "run")
        assert offered(disk / "run" / "checkpoints") == steps

        ballast.unlink()
        process = start(*args)
        first = process.stderr.readline()
        assert int(re.match(r"step (\d+)/", first)[1]) // 100 == max(steps) // 100 + 1
        process.kill()
        process.communicate()  # nothing can be unmounted under it


def test_a_checkpoint_directory_that_cannot_be_written_is_told(tiny_config, tmp_path, begun):
    tiny_config.num_steps = 4
    loop.train(tiny_config, tmp_path / "run")
    tiny_config.num_steps = 8
    checkpoints = tmp_path / "run" / "checkpoints"
    with (
        _mounted(checkpoints, "--bind", "-o", "ro", str(checkpoints)),
        pytest.raises(UserError, match=r"cannot save .*checkpoints/6: .*[Rr]ead-only.*\[2, 4\]"),
    ):
        loop.train(tiny_config, tmp_path / "run")
    assert loop.train(tiny_config, tmp_path / "run")["step"] == 8
    assert begun == [0, 4, 4]


def test_a_workdir_that_cannot_be_written_is_told(tiny_config, tmp_path, begun):
    run = tmp_path / "run"
    run.mkdir()
    with (
        _mounted(run, "--bind", "-o", "ro", str(run)),
        pytest.raises(UserError, match=r"--workdir=.* cannot be written: Read-only"),
    ):
        loop.train(tiny_config, run)
    assert begun == []


def test_two_runs_that_begin_at_once_do_not_take_the_workdir_for_read_only(tmp_path, monkeypatch):
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (touch(path), path.unlink()))  # by the other
    workdir.create(tmp_path)


@pytest.fixture
def saved_run(tiny_config, tmp_path, begun):
    loop.train(tiny_config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.parent.name != "quarantine" and ".lock" not in path.name
    }


OTHERS = {
    "latent.maps": ("5", "4"),
    "latent.name": ("mvn", "'lowrank'"),
    "model.norm": ("group", "'batch'"),
    "objective.beta": ("0.5", "1.0"),
    "optimizer.learning_rate": ("0.1", "0.001"),
    "batch_size": ("6", "12"),
    "seed": ("1", "0"),
    "model.dtype": ("bfloat16", "'float32'"),
}


def test_another_configuration_condemns_nothing(start, tiny_config, saved_run):
    """All cases in turn, two at a time, since each process starts for seconds."""
    before = contents(saved_run)
    pending = list(OTHERS.items())
    while pending:
        chunk, pending = pending[:2], pending[2:]
        processes = [
            start(*command_line.arguments(tiny_config, saved_run, **{field: value}))
            for field, (value, _) in chunk
        ]
        for process, (field, (value, was)) in zip(processes, chunk, strict=True):
            line = _error(command_line.finish(process))
            assert re.search(rf" {field}='?{value}'? \(was {was}\)\. Choose another", line), line
    assert contents(saved_run) == before


def test_where_all_checkpoints_are_bad_nothing_begins_anew(tiny_config, saved_run, begun):
    for step in (4, 6, 8):
        _damage_array(*_largest_array(saved_run / "checkpoints" / str(step)), "flip")
    before = (saved_run / "metrics.jsonl").read_bytes()
    code, stdout, stderr = command_line.run(*command_line.arguments(tiny_config, saved_run))
    assert (code, stdout) == (2, "")
    *warnings, line = stderr.splitlines()
    assert len(warnings) == 3
    assert all(
        "does not match its SHA-256" in w and w.endswith(f"quarantine/{step}")
        for w, step in zip(warnings, (8, 6, 4), strict=True)
    )
    for _ in range(2):  # and so it stays
        assert re.match(
            r"(error: )?no intact checkpoint in .*; use another workdir, or delete the quarantine",
            line,
        )
        assert not (saved_run / "result.json").exists()
        assert (saved_run / "metrics.jsonl").read_bytes() == before
        with pytest.raises(UserError) as caught:
            loop.train(tiny_config, saved_run)
        line = str(caught.value)
    shutil.rmtree(saved_run / "checkpoints" / "quarantine")
    assert loop.train(tiny_config, saved_run)["step"] == 8
    assert begun[-1] == 0


def test_numbers_that_are_not_finite_end_the_run_in_one_line(tiny_config, tmp_path):
    tiny_config.optimizer.learning_rate = 1e30
    line = _error(command_line.run(*command_line.arguments(tiny_config, tmp_path / "run")))
    assert re.search(
        r"the [a-z ]+ was not finite in step [12]; lower .* Last good checkpoint: None", line
    )
    assert not (tmp_path / "run" / "result.json").exists()


# Signals at unlucky instants.


@pytest.mark.parametrize(("begin", "number"), [(0, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_signal_before_the_first_step_costs_nothing(
    tiny_config, tmp_path, begun, monkeypatch, begin, number
):
    """It comes while images go to the device; no step may be logged or saved twice."""
    loop.train(tiny_config, tmp_path / "whole")
    directory = tmp_path / "run"
    if begin:
        tiny_config.num_steps = begin
        loop.train(tiny_config, directory)
        tiny_config.num_steps = 8
    make = feed.make
    with monkeypatch.context() as patch:
        patch.setattr(feed, "make", lambda *args: (os.kill(os.getpid(), number), make(*args))[1])
        with pytest.raises(interrupt.Stopped) as stopped:
            loop.train(tiny_config, directory)
    assert stopped.value.exit_code == 128 + number
    assert max(offered(directory / "checkpoints")) == begin + 1
    loop.train(tiny_config, directory)
    assert fingerprint(directory) == fingerprint(tmp_path / "whole")
    assert rows(directory) == rows(tmp_path / "whole")


def test_a_signal_while_evaluating_ends_the_run_after_one_more_step(
    tiny_config, tmp_path, begun, monkeypatch
):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"elbo": -1.0}

    with monkeypatch.context() as patch:
        patch.setattr(bounds, "held_out", interrupted)
        with pytest.raises(interrupt.Stopped, match="saved at step 5; "):
            loop.train(tiny_config, tmp_path)
    assert offered(tmp_path / "checkpoints") == [2, 4, 5]
    loop.train(tiny_config, tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [2, 4, 6, 8]


# Another machine.


def test_a_run_goes_on_with_the_same_bits_on_another_number_of_devices(
    start, tiny_config, tmp_path, begun
):
    """Saved on 8 devices, then 2, then 1: each restores exactly what the one before it saved."""
    tiny_config.update(batch_size=16, log_every=1)
    tiny_config.latent.update(height=4, width=4)
    tiny_config.model.update(encoder="3x3/4/s2", decoder="3x3/4 3x3/4 3x3/image")
    run = tmp_path / "run"
    restored = """
from unittest import mock
from svae_jax.run import checkpoint, writer
from svae_jax.evaluation import bounds, previews
from svae_jax.training import loop
restore = loop._restore_or_init
def told(job, checkpoints):
    found = restore(job, checkpoints)
    print(job.mesh.size, int(found.state.step), checkpoint.fingerprint(found._asdict()))
    assert len(found.state.step.sharding.device_set) == job.mesh.size
    return found
loop._restore_or_init = told
bounds.held_out = lambda *args, **kwargs: {"elbo": -1.0}
previews.draw = lambda *args: {}
writer._summary_writer = lambda directory: mock.MagicMock()
"""
    last = 0
    for count, num_steps in ((8, 3), (2, 5), (1, 7)):
        before = fingerprint(run) if last else None
        tiny_config.num_steps = num_steps
        code, stdout, stderr = command_line.finish(
            start(
                *command_line.arguments(tiny_config, run),
                before=restored,
                **command_line.host_devices(count),
            )
        )
        assert code == 0, stderr
        size, step, found = stdout.splitlines()[0].split()
        assert (int(size), int(step)) == (count, last)
        assert before is None or found == before
        last = num_steps
    assert [row["step"] for row in rows(run) if "train/loss" in row] == list(range(1, 8))


# Files that mean harm.


def test_a_planted_pickle_is_never_executed(tiny_config, tmp_path, begun):
    """In place of every file that training or loading reads."""
    tiny_config.dataset.cache_dir = str(tmp_path / "cache")
    tiny_config.num_steps = 6
    saved, proof = tmp_path / "saved", tmp_path / "executed"
    loop.train(tiny_config, saved)
    tiny_config.num_steps = 8
    bomb = pickle.dumps(Bomb(proof))
    caches = sorted(Path(tiny_config.dataset.cache_dir).rglob("*.npy"))
    assert len(caches) == 2
    header = b"\x93NUMPY\x01\x00"
    as_objects = str({"descr": "|O", "fortran_order": False, "shape": (1,)}).encode().ljust(117)
    planted = header + (118).to_bytes(2, "little") + as_objects + b"\n" + bomb
    (directory := tmp_path / "planted.npy").write_bytes(planted)
    np.load(directory, allow_pickle=True)
    assert proof.exists()  # and so would NumPy, if it were let
    proof.unlink()
    names = ["config.json", "result.json", "metrics.jsonl", *_checkpoint_files(saved)]
    for number, name in enumerate([*caches, *names]):
        directory = Path(shutil.copytree(saved, tmp_path / str(number)))
        if isinstance(name, Path):
            intact = name.read_bytes()
            name.unlink()  # others have it mapped into memory
            name.write_bytes(planted)
        else:
            (directory / name).write_bytes(bomb)
        told = pytest.raises(UserError, match="is damaged")
        with told if name in names[:2] else contextlib.nullcontext():
            loop.train(tiny_config, directory)
        with told if name == "config.json" else contextlib.nullcontext():
            svae_jax.load(directory)
        assert not isinstance(name, Path) or name.read_bytes() == intact
        assert not proof.exists(), name


def _checkpoint_files(directory):
    newest = directory / "checkpoints" / "6"
    return [
        str(path.relative_to(directory)) for path in sorted(newest.rglob("*")) if path.is_file()
    ]
