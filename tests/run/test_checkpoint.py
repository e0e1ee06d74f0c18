"""What is saved comes back bit for bit, or is not offered at all."""

import asyncio
import errno
import hashlib
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from svae_jax.errors import UserError
from svae_jax.run import checkpoint
from svae_jax.run.checkpoint import Checkpointer, arrays, load, manager, reading, storage
from tests import command_line

CONFIG = {"seed": 0, "latent": {"name": "lowrank", "rank": 1}, "optimizer": {"learning_rate": 1e-4}}


class State(NamedTuple):
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


def make_state(step, ema=False):
    """A state that tells its step in every array; the large ones get data files of their own."""
    rng = np.random.default_rng(step)
    params = {
        "encoder": {
            "kernel": jnp.asarray(rng.normal(size=(40, 60)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        },
        "table": jnp.asarray(rng.integers(-(2**31), 2**31, size=(3, 5)), jnp.int32),
    }
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt_state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 100, x.dtype), optimizer.init(params)
    )
    special = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, step], np.float32)
    return State(
        step=jnp.int32(step),
        params=params,
        batch_stats={"mean": jnp.asarray(special)},
        opt_state=opt_state,
        ema=grads if ema else None,
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(left, right):
    """Same structure, dtypes, shapes and bytes; written without anything of the module."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def write(directory, steps, **kwargs):
    with Checkpointer(directory, keep=100) as saver:
        for step in steps:
            saver.save(step, make_state(step), config=CONFIG, **kwargs)
    return directory


def offered(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def tree_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 10 and 20; tests damage a copy."""
    return write(tmp_path_factory.mktemp("saved") / "checkpoints", [10, 20])


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# Saving and restoring.


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_bit_exact(tmp_path, ema):
    state = make_state(3, ema)
    with Checkpointer(tmp_path) as saver:
        saver.save(3, state, config=CONFIG)
        step, restored = saver.restore(abstract(state), config=CONFIG)
    assert step == 3
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert_same(restored, state)


def test_target_may_be_the_state_itself(copy):
    with Checkpointer(copy) as saver:
        assert_same(saver.restore(make_state(0))[1], make_state(20))


def test_no_checkpoint_is_none_and_makes_nothing(tmp_path):
    with Checkpointer(tmp_path / "new") as saver:
        assert saver.latest_step() is None
        assert saver.restore(abstract(make_state(0)), config=CONFIG) is None
    assert not (tmp_path / "new").exists()


def test_meta_holds_configuration_versions_and_hashes(copy):
    meta = json.loads((copy / "20" / "meta" / "metadata").read_text())
    assert meta["config"] == CONFIG
    assert meta["versions"]["jax"] == jax.__version__
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= set(meta["versions"])
    bias = np.asarray(make_state(20).params["encoder"]["bias"])
    assert meta["arrays"]["params/encoder/bias"] == {
        "dtype": "bfloat16",
        "shape": [7],
        "sha256": hashlib.sha256(b"bfloat16[7]" + bias.tobytes()).hexdigest(),
    }
    assert len(meta["arrays"]) == len(jax.tree.leaves(make_state(20)))


def test_layout_is_plain_digits(copy):
    assert sorted(path.name for path in copy.iterdir()) == ["10", "20"]
    assert {"state", "meta"} < {path.name for path in (copy / "20").iterdir()}


def test_buffers_may_be_donated_when_save_returns(tmp_path, monkeypatch):
    donated = threading.Event()
    orbax_save = storage.save

    def late(*args):
        assert donated.wait(10)
        orbax_save(*args)

    monkeypatch.setattr(storage, "save", late)
    state = make_state(1)
    pointer = state.params["encoder"]["kernel"].unsafe_buffer_pointer()
    with Checkpointer(tmp_path) as saver:
        saver.save(1, state, config=CONFIG)
        overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
        after = jax.block_until_ready(overwrite(state))
        donated.set()
        restored = saver.restore(abstract(after))[1]
    # In place indeed: nothing of the save holds the buffer.
    assert after.params["encoder"]["kernel"].unsafe_buffer_pointer() == pointer
    assert_same(restored, make_state(1))


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(storage, "save", lambda *args: release.wait(10))
    with Checkpointer(tmp_path) as saver:
        saver.save(1, make_state(1), config=CONFIG)
        assert not saver._pending.done()
        release.set()


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([None] * 6, [5, 6]),
        ([-9, -3, -5, -6, -7, -8], [2, 5, 6]),
        ([-9, -3, -5, None, float("nan"), float("inf")], [2, 5, 6]),
        ([-9, -8, -7, -6, -5, -4], [5, 6]),
        ([-3, -3, -3, -4, -5, -6], [3, 5, 6]),
        ([None, None, -7, None, None, None], [3, 5, 6]),
    ],
)
def test_newest_and_best_are_kept(tmp_path, scores, kept):
    for step, score in enumerate(scores, start=1):
        with Checkpointer(tmp_path, keep=2) as saver:  # scores survive a restart
            metrics = {} if score is None else {"eval/elbo": score, "eval/other": -score}
            saver.save(step, make_state(step), config=CONFIG, metrics=metrics)
    assert offered(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.keep=0"):
        Checkpointer(tmp_path, keep=0)


@pytest.mark.parametrize("change", ["bytes", "dtype", "shape", "path", "order"])
def test_fingerprint_tells_states_apart(change):
    one = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(2, np.int32)}
    other = {
        "bytes": {**one, "a": np.array([0, 1, 2, np.nextafter(np.float32(3), 4)], np.float32)},
        "dtype": {**one, "b": np.zeros(2, np.uint32)},
        "shape": {**one, "a": one["a"].reshape(2, 2)},
        "path": {"a": one["a"], "c": one["b"]},
        "order": {"a": one["a"][::-1], "b": one["b"]},
    }[change]
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(jax.tree.map(jnp.asarray, one))
    assert checkpoint.fingerprint(one) != checkpoint.fingerprint(other)


# Damage.

DAMAGE = {
    "flip": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "truncate": lambda data: data[: len(data) // 2],
    "zero": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
    "delete": None,
}
NEEDED = ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt")


def damage(file, how):
    if DAMAGE[how] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGE[how](file.read_bytes()))


def blob(step_directory):
    """The file that holds the arrays themselves."""
    files = (path for path in (step_directory / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("how", DAMAGE)
def test_fault_matrix(saved, tmp_path, how):
    files = [p.relative_to(saved / "20") for p in sorted((saved / "20").rglob("*")) if p.is_file()]
    assert len(files) > 8
    blob_file = blob(saved / "20").relative_to(saved / "20")
    outcome = {}
    for number, file in enumerate(files):
        directory = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
        damage(directory / "20" / file, how)
        with Checkpointer(directory) as saver:
            step, state = saver.restore(abstract(make_state(0)), config=CONFIG)
            assert_same(state, make_state(step))
            saver.save(step + 5, make_state(step + 5), config=CONFIG)
            saver.wait()
            again, state = saver.restore(abstract(make_state(0)), config=CONFIG)
        assert again == step + 5, file
        assert_same(state, make_state(step + 5))
        outcome[str(file)] = step
        assert (directory / "quarantine" / "20").exists() == (step == 10)
    assert all(outcome[name] == 10 for name in (*NEEDED, str(blob_file)))
    # What nobody needs condemns nothing.
    assert all(outcome[name] == 20 for name in ("commit_success.txt", "_CHECKPOINT_METADATA"))


def test_any_flipped_bit_is_caught_or_harmless(saved, tmp_path):
    rng = random.Random(0)
    files = [path for path in sorted((saved / "20").rglob("*")) if path.is_file()]
    for number in range(40):
        file = rng.choice(files)
        directory = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (directory / file.relative_to(saved)).write_bytes(bytes(data))
        with Checkpointer(directory) as saver:
            step, state = saver.restore(abstract(make_state(0)), config=CONFIG)
        assert step in (10, 20)
        assert_same(state, make_state(step))


def test_a_bit_that_orbax_restores_silently(copy, caplog):
    damage(blob(copy / "20"), "flip")
    raw = ocp.StandardCheckpointer().restore(copy / "20" / "state")  # no error: this is the danger
    pairs = zip(jax.tree.leaves(make_state(20)._asdict()), jax.tree.leaves(raw), strict=True)
    assert any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
    with Checkpointer(copy) as saver:
        step, state = saver.restore(abstract(make_state(0)))
    assert step == 10
    assert_same(state, make_state(10))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "does not match its SHA-256" in warning
    assert "quarantine/20" in warning
    assert any(name in warning for name in ("kernel", "bias", "table", "mean", "count"))
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("edit", "step"),
    [
        (lambda meta: meta["config"].update(seed=1), 10),
        (lambda meta: meta.update(seal="0" * 64), 10),
        (lambda meta: meta.update(step=30), 10),
        (lambda meta: meta.update(), 20),
    ],
)
def test_meta_is_sealed(copy, edit, step):
    """Damage that is still JSON is damage, and no other configuration."""
    path = copy / "20" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    edit(meta)
    path.write_text(json.dumps(meta))
    with Checkpointer(copy) as saver:
        assert saver.restore(abstract(make_state(0)), config=CONFIG)[0] == step


def test_a_step_under_another_name_is_refused(copy):
    shutil.copytree(copy / "10", copy / "30")
    with Checkpointer(copy) as saver:
        assert saver.restore(abstract(make_state(0)))[0] == 20


def test_steps_up_to_a_bad_one_are_saved_again(copy):
    with Checkpointer(copy) as saver:
        for _ in range(3):
            damage(blob(copy / "20"), "truncate")
            assert saver.restore(abstract(make_state(0)))[0] == 10
            saver.save(15, make_state(15), config=CONFIG)
            saver.save(20, make_state(20), config=CONFIG)
            step, state = saver.restore(abstract(make_state(0)))
            assert step == 20
            assert_same(state, make_state(20))  # the new one, whatever a cache remembers
            shutil.rmtree(copy / "15")
    assert sorted(p.name for p in (copy / "quarantine").iterdir()) == ["20", "20-2", "20-3"]


def test_all_bad_is_an_error_and_stays_one(copy):
    for step in (10, 20):
        damage(copy / str(step) / "meta" / "metadata", "empty")
    for _ in range(2):
        with Checkpointer(copy) as saver, pytest.raises(UserError, match="all are damaged"):
            saver.restore(abstract(make_state(0)))
    shutil.rmtree(copy / "quarantine")
    with Checkpointer(copy) as saver:
        assert saver.restore(abstract(make_state(0))) is None


# A user's mistake condemns nothing.


def other_dtype(state):
    return state._replace(batch_stats={"mean": jax.ShapeDtypeStruct((6,), jnp.bfloat16)})


def other_shape(state):
    return state._replace(batch_stats={"mean": jax.ShapeDtypeStruct((7,), jnp.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_dtype, r"batch_stats/mean=bfloat16\[6\] \(saved: float32\[6\]\)"),
        (other_shape, r"batch_stats/mean=float32\[7\] \(saved: float32\[6\]\)"),
        (lambda s: s._replace(ema=s.params), r"ema/encoder/bias=bfloat16\[7\] \(saved: absent\)"),
        (
            lambda s: s._replace(batch_stats=None),
            r"batch_stats/mean=absent \(saved: float32\[6\]\)",
        ),
        (lambda s: s._replace(opt_state=optax.sgd(0.1).init(s.params)), "and 2 more"),
    ],
)
def test_another_model_is_a_users_mistake(copy, change, message):
    before = tree_of(copy)
    with Checkpointer(copy) as saver:
        with pytest.raises(UserError, match=message):
            saver.restore(change(abstract(make_state(0))), config=CONFIG)
        assert tree_of(copy) == before
        assert saver.restore(abstract(make_state(0)), config=CONFIG)[0] == 20


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"seed": 1}, r"seed=1 \(saved: 0\)"),
        (
            CONFIG | {"latent": {"name": "mvn", "rank": 1}},
            r'latent.name="mvn" \(saved: "lowrank"\)',
        ),
        (CONFIG | {"new": None}, r"new=null \(saved: absent\)"),
        (CONFIG | {"seed": False}, r"seed=false \(saved: 0\)"),
    ],
)
def test_another_configuration_is_a_users_mistake(copy, config, message):
    before = tree_of(copy)
    with Checkpointer(copy) as saver, pytest.raises(UserError, match=message):
        saver.restore(abstract(make_state(0)), config=config)
    assert tree_of(copy) == before


def test_configuration_is_compared_as_json(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(1, make_state(1), config={"a": (1, 2), "b": float("nan"), "c": {}})
        assert saver.restore(make_state(0), config={"a": [1, 2], "b": float("nan"), "c": {}})
        assert saver.restore(make_state(0), config={"b": float("nan")})  # what is given must agree
        with pytest.raises(UserError, match=r"d=1 .saved: absent"):
            saver.restore(make_state(0), config={"a": [1, 2], "d": 1})
        with pytest.raises(TypeError):
            saver.save(2, make_state(2), config={"a": object()})


def test_a_folder_that_may_not_be_read_is_not_damaged(copy, monkeypatch):
    before, scan = tree_of(copy), os.scandir

    def refuse(path):
        if str(path).endswith("20/state"):  # root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    def fail(path):
        raise ValueError("PERMISSION_DENIED: Error opening")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        patch.setattr(storage, "read", fail)
        with Checkpointer(copy) as saver, pytest.raises(UserError, match="20/state: Permission d"):
            saver.restore(abstract(make_state(0)))
    assert tree_of(copy) == before


def test_a_future_format_is_not_damaged(copy):
    path = copy / "20" / "meta" / "metadata"
    meta = json.loads(path.read_text()) | {"format": 99}
    meta.pop("seal")
    path.write_text(json.dumps(meta | {"seal": arrays.digest(meta)}))
    with Checkpointer(copy) as saver, pytest.raises(UserError, match="format=99"):
        saver.restore(abstract(make_state(0)))
    assert offered(copy) == [10, 20]


# Saves that fail.


@pytest.mark.parametrize("step", [19, 20])
def test_a_step_that_is_not_new_is_refused_at_once(copy, step):
    with Checkpointer(copy) as saver:
        with pytest.raises(UserError, match=f"cannot save step {step}"):
            saver.save(step, make_state(step), config=CONFIG)
        saver.save(21, make_state(21), config=CONFIG)
    assert offered(copy) == [10, 20, 21]


def test_a_save_that_orbax_refuses_is_an_error(copy, monkeypatch):
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    saver = Checkpointer(copy)
    saver.save(30, make_state(30), config=CONFIG)
    with pytest.raises(UserError, match=r"30: Orbax refuses it.*\[10, 20\]"):
        saver.close()


@pytest.mark.parametrize("surface", ["save", "wait", "close", "restore"])
def test_a_failed_save_surfaces_once_and_the_run_goes_on(copy, monkeypatch, surface):
    orbax_save = storage.save

    def full(path, *args):
        rubbish = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
        rubbish.mkdir()
        (rubbish / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "save", full)
    saver = Checkpointer(copy)
    saver.save(30, make_state(30), config=CONFIG)
    with pytest.raises(UserError, match=r"30: No space left on device.*\[10, 20\]"):
        {
            "save": lambda: saver.save(40, make_state(40), config=CONFIG),
            "wait": saver.wait,
            "close": saver.close,
            "restore": lambda: saver.restore(make_state(0)),
        }[surface]()
    assert sorted(path.name for path in copy.iterdir()) == ["10", "20"]
    assert_same(load(copy, make_state(0)).state, make_state(20))
    monkeypatch.setattr(storage, "save", orbax_save)
    with Checkpointer(copy) if surface == "close" else saver as saver:
        saver.save(30, make_state(30), config=CONFIG)
        assert_same(saver.restore(make_state(0))[1], make_state(30))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    saver = Checkpointer(tmp_path / "file" / "checkpoints")
    saver.save(1, make_state(1), config=CONFIG)
    with pytest.raises(UserError, match=r"file/checkpoints/1: Not a directory"):
        saver.close()


def test_a_failed_save_does_not_hide_another_exception(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")

    def run():
        with Checkpointer(tmp_path / "file") as saver:
            saver.save(1, make_state(1), config=CONFIG)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "cannot save" in caplog.text


def test_an_interrupt_while_waiting_forgets_no_failure(copy, monkeypatch):
    def interrupted(futures):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    saver = Checkpointer(copy)
    saver.save(30, make_state(30), config=CONFIG)
    saver._worker.shutdown()
    monkeypatch.setattr(manager.concurrent.futures, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    with pytest.raises(UserError, match="cannot save"):
        saver.close()


def test_rubbish_of_a_killed_save_is_no_step_and_in_nobodys_way(copy, monkeypatch):
    names = ("30.orbax-checkpoint-tmp", "40.orbax-checkpoint-tmp", "5.deleted", "30.deleted/10")
    for name in names:
        shutil.copytree(copy / "20", copy / name)
    orbax_save = storage.save

    def there_is_room(*args):
        assert sorted(path.name for path in copy.iterdir()) == ["10", "20"]
        orbax_save(*args)

    monkeypatch.setattr(storage, "save", there_is_room)
    with Checkpointer(copy) as saver:
        assert saver.latest_step() == 20
        saver.save(30, make_state(30), config=CONFIG)
    assert sorted(path.name for path in copy.iterdir()) == ["10", "20", "30"]


def test_only_a_runs_own_rubbish_goes(copy):
    for name in ("notes.deleted", "mine.orbax-checkpoint-tmp", "old"):
        shutil.copytree(copy / "20", copy / name)
    with Checkpointer(copy, keep=1) as saver:
        saver.save(30, make_state(30), config=CONFIG)
    left = {"30", "notes.deleted", "mine.orbax-checkpoint-tmp", "old"}
    assert {path.name for path in copy.iterdir()} == left


def test_a_half_deleted_step_is_never_on_offer(copy, monkeypatch):
    def half(path, **kwargs):
        (metadata,) = path.glob("20/meta/metadata")
        metadata.rename(copy / "witness")

    monkeypatch.setattr(shutil, "rmtree", half)
    with Checkpointer(copy, keep=1) as saver:
        saver.save(30, make_state(30), config=CONFIG)
        saver.wait()
        assert (copy / "witness").exists()
        assert offered(copy) == [30]
        assert saver.restore(make_state(0))[0] == 30
    assert not (copy / "quarantine").exists()


def test_a_disk_error_at_the_flush_is_a_failed_save(copy, monkeypatch):
    def broken(descriptor):
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    saver = Checkpointer(copy, keep=1)
    saver.save(30, make_state(30), config=CONFIG)
    with pytest.raises(UserError, match=r"30: Input/output error.*\[10, 20, 30\]"):
        saver.close()  # and nothing older was deleted


@pytest.mark.filterwarnings("error")  # among them tracebacks of writes that nobody waited for
def test_full_disk(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        directory = disk / "checkpoints"
        with Checkpointer(directory) as saver:
            saver.save(1, make_state(1), config=CONFIG)
            saver.save(2, make_state(2), config=CONFIG)
            saver.wait()
            free = shutil.disk_usage(disk).free
            (disk / "ballast").write_bytes(bytes(free - 16384))
            before = tree_of(directory)
            caplog.set_level("DEBUG", logger="absl")
            saver.save(3, make_state(3), config=CONFIG)
            with pytest.raises(UserError, match=r"checkpoints/3: .*[Nn]o space left.*\[1, 2\]"):
                saver.save(4, make_state(4), config=CONFIG)
            assert tree_of(directory) == before
            assert not [record for record in caplog.records if "orbax" in record.pathname]
            saver.save(4, make_state(4), config=CONFIG)
            with pytest.raises(UserError, match="No space left"):
                saver.wait()
            assert_same(saver.restore(make_state(0))[1], make_state(2))
            (disk / "ballast").unlink()
            saver.save(3, make_state(3), config=CONFIG)
            assert_same(saver.restore(make_state(0))[1], make_state(3))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Reading without writing.


def test_load_gives_plain_arrays(copy):
    loaded = load(copy)
    assert (loaded.step, loaded.config, loaded.metrics) == (20, CONFIG, {})
    assert isinstance(loaded.state["params"]["encoder"]["kernel"], np.ndarray)
    assert loaded.state["ema"] is None
    assert loaded.state["opt_state"][1][0]["count"].dtype == np.int32
    raw = loaded.state["params"]
    assert_same(raw, make_state(20).params)


def test_load_takes_the_best(tmp_path):
    with Checkpointer(tmp_path) as saver:
        for step, score in [(1, -5.0), (2, -1.0), (3, -2.0), (4, None)]:
            metrics = None if score is None else {"eval/elbo": score}
            saver.save(step, make_state(step), config=CONFIG, metrics=metrics)
    best = load(tmp_path, make_state(0), best=True)
    assert (best.step, best.metrics) == (2, {"eval/elbo": -1.0})
    assert_same(best.state, make_state(2))
    assert load(tmp_path).step == 4
    damage(blob(tmp_path / "2"), "flip")
    assert load(tmp_path, best=True).step == 3


def test_load_without_scores_takes_the_newest(copy):
    assert load(copy, best=True).step == 20


def test_load_changes_nothing(copy):
    damage(blob(copy / "20"), "flip")
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    before = tree_of(copy)
    assert load(copy).step == 10
    damage(copy / "10" / "meta" / "metadata", "empty")
    before = tree_of(copy)
    with pytest.raises(UserError, match="no intact checkpoint"):
        load(copy)
    assert tree_of(copy) == before


def test_load_where_nothing_is(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "nowhere")


def test_load_finds_the_step_that_took_the_place_of_a_deleted_one(copy, monkeypatch, caplog):
    read = reading.read_meta
    gone = []

    def overtaken(folder, step):
        if not gone:
            gone.append(step)
            (folder / "20").rename(folder / "30")  # what a run does meanwhile, seen from here
            shutil.rmtree(folder / "30")
            write(folder, [30])
            shutil.rmtree(folder / "10")
        return read(folder, step)

    monkeypatch.setattr(reading, "read_meta", overtaken)
    assert load(copy).step == 30
    assert not caplog.records


def test_load_inside_a_running_event_loop(copy):
    """As in a notebook."""

    async def cell():
        return load(copy).step

    assert asyncio.run(cell()) == 20


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


def test_nothing_is_unpickled(saved, tmp_path):
    proof = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(proof))
    pickle.loads(bomb)
    assert proof.exists()  # it would
    proof.unlink()
    code = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    payloads = [bomb, code.encode(), f"!!python/object/apply:os.system ['touch {proof}']".encode()]
    extra = ["state/checkpoint", "state/params.pkl", "meta/metadata.pkl", "state/_sharding"]
    files = [str(p.relative_to(saved / "20")) for p in (saved / "20").rglob("*") if p.is_file()]
    for number, name in enumerate([*files, *extra]):
        for kind, payload in enumerate(payloads):
            directory = pathlib.Path(shutil.copytree(saved, tmp_path / f"{number}-{kind}"))
            (directory / "20" / name).write_bytes(payload)
            load(directory)
            with Checkpointer(directory) as saver:
                saver.restore(make_state(0))
    # Python code as a value of the JSON, sealed as whoever wants to harm would.
    path = directory / "10" / "meta" / "metadata"
    meta = json.loads(path.read_text()) | {"config": {"seed": code, "__reduce__": code}}
    meta.pop("seal")
    path.write_text(json.dumps(meta | {"seal": arrays.digest(meta)}))
    load(directory)
    assert not proof.exists()


# Whole processes.


def python(code, *args, **env):
    """Runs code in a process of its own, with this file's helpers at hand."""
    prelude = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent.parent)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


DEVICES = """
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from svae_jax.run.checkpoint import Checkpointer
    from tests.run.test_checkpoint import CONFIG, assert_same, make_state

    def placed(state, count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        def shard(x):  # a sharded array among replicated ones
            return NamedSharding(mesh, P("data") if x.shape == (40, 60) else P())
        return jax.device_put(state, jax.tree.map(shard, state))

    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(sys.argv[1]) as saver:
        state = placed(make_state(1), 8)
        for number, count in enumerate((8, 2, 1, 4), start=1):
            saver.save(number, state, config=CONFIG)
            wanted = jax.device_get(state)
            number, state = saver.restore(placed(make_state(0), count), config=CONFIG)
            assert len(state.params["encoder"]["kernel"].sharding.device_set) == count
            assert_same(state, wanted)
            wanted = jax.device_get(step(placed(wanted, count)))
            state = step(state)  # donated: what was restored is not shared with anything
            assert_same(state, wanted)
    print("same")
"""


def test_other_device_counts(tmp_path):
    child = python(DEVICES, tmp_path, **command_line.host_devices(8))
    out, err = child.communicate(timeout=120)
    assert out == "same\n", err


CHATTER = """
    from absl import app, logging
    def main(argv):
        logging.set_verbosity(logging.WARNING)  # as svae_jax.main does
        from svae_jax.run import checkpoint
        from tests.run.test_checkpoint import make_state, CONFIG
        with checkpoint.Checkpointer(argv[1]) as saver:
            assert saver.restore(make_state(0), config=CONFIG)[0] == 10
            saver.save(15, make_state(15), config=CONFIG)
            saver.save(16, make_state(16), config=CONFIG)
        checkpoint.load(argv[1])
    app.run(main)
"""


def test_terminal_shows_one_line_for_a_damaged_step_and_nothing_else(copy):
    damage(next((copy / "20" / "state" / "d").iterdir()), "delete")
    out, err = python(CHATTER, copy).communicate(timeout=120)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "is damaged" in err


SAVES = """
    import itertools
    from svae_jax.run.checkpoint import Checkpointer
    from tests.run.test_checkpoint import make_state, CONFIG
    saver = Checkpointer(sys.argv[1], keep=2)
    last = saver.restore(make_state(0), config=CONFIG)
    print(last and last[0], flush=True)
    for step in itertools.count(1 + (last[0] if last else 0)):
        saver.save(step, make_state(step), config=CONFIG, metrics={"eval/elbo": -(step % 7)})
        if step % 2:
            saver.wait()
"""


def kill_and_verify(directory, kills, seed):
    rng = random.Random(seed)
    newest = None
    for _ in range(kills):
        child = python(SAVES, directory)
        resumed = child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.5))
        child.send_signal(signal.SIGKILL)
        _, err = child.communicate()
        assert child.returncode == -signal.SIGKILL, err
        assert resumed == f"{newest}\n", err  # it went on where the one before it was killed
        newest = None
        for step in offered(directory) if directory.exists() else []:
            alone = directory.with_name("alone")
            shutil.copytree(directory / str(step), alone / str(step))
            loaded = load(alone, make_state(0))
            assert loaded.step == step
            assert_same(loaded.state, make_state(step))
            shutil.rmtree(alone)
            newest = step
    assert newest is not None
    assert not (directory / "quarantine").exists()


def test_kill(tmp_path):
    kill_and_verify(tmp_path / "checkpoints", 3, seed=1)


@pytest.mark.soak
def test_many_kills(tmp_path):
    kill_and_verify(tmp_path / "checkpoints", 20, seed=2)
