"""Errors that may pass, such as those of a network file system, condemn no checkpoint."""

import errno
import io
import os
import pathlib
import shutil

import pytest

from svae_jax import files
from svae_jax.errors import UserError
from svae_jax.run.checkpoint import Checkpointer, NoneIntactError, are_lost, load, storage
from tests.run.test_checkpoint import abstract, assert_same, blob, make_state, tree_of

PASSING = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.EACCES]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "run" / "checkpoints"
    with Checkpointer(directory) as saver:
        for step in (10, 20):
            saver.save(step, make_state(step), config={})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved.parent, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def failing_open(monkeypatch, part, number, times=1000):
    """Makes `open` fail for paths that hold `part`, so often."""
    left = [times]

    def wrap(function):
        def call(file, *args, **kwargs):
            if part in str(file) and left[0] > 0:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(file))
            return function(file, *args, **kwargs)

        return call

    monkeypatch.setattr(io, "open", wrap(io.open))
    monkeypatch.setattr("builtins.open", wrap(open))
    monkeypatch.setattr(os, "open", wrap(os.open))


def restore(directory):
    with Checkpointer(directory) as saver:
        return saver.restore(abstract(make_state(0)))


@pytest.mark.parametrize("part", ["20/meta/metadata", "20/state/_METADATA"])
@pytest.mark.parametrize("number", PASSING)
def test_an_error_of_the_system_moves_nothing(copy, monkeypatch, part, number):
    before = tree_of(copy)
    with monkeypatch.context() as patch:
        failing_open(patch, part, number)
        for read in (restore, load):
            with pytest.raises(UserError, match=rf"cannot read .*20.*{os.strerror(number)}"):
                read(copy)
    assert tree_of(copy) == before
    assert restore(copy)[0] == 20


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        ValueError("UNKNOWN: Error opening zarr driver [OS error 5: EIO Input/output error]"),
        RuntimeError("UNAVAILABLE: no answer"),
        TimeoutError("later"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("listed", [True, False], ids=["new", "of an older version"])
def test_an_error_of_the_storage_library_moves_nothing(copy, monkeypatch, error, listed):
    if not listed:
        (copy / "20" / "sha256.json").unlink()
    before = tree_of(copy)

    def read(path):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read", read)
        with pytest.raises(UserError, match="nothing was moved or deleted") as caught:
            restore(copy)
    assert "\n" not in str(caught.value)
    assert tree_of(copy) == before


def test_a_step_of_an_older_version_is_condemned_for_damage_alone(copy):
    for step, damage in ((20, b""), (10, None)):
        (copy / str(step) / "sha256.json").unlink()
        file = blob(copy / str(step))
        file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(NoneIntactError, match=r"to put one back: mv \S+quarantine/20 \S+/20;"):
        restore(copy)
    assert {path.name for path in (copy / "quarantine").iterdir()} == {"10", "20"}


def test_a_step_that_is_put_back_is_used_again(copy):
    file = copy / "20" / "meta" / "metadata"
    content = file.read_bytes()
    file.write_bytes(b"")
    assert restore(copy)[0] == 10
    (copy / "quarantine" / "20").rename(copy / "20")
    file.write_bytes(content)
    step, state = restore(copy)
    assert step == 20
    assert_same(state, make_state(20))


def test_the_best_step_is_not_deleted_where_it_cannot_be_read(tmp_path, monkeypatch, caplog):
    with Checkpointer(tmp_path / "checkpoints", keep=1) as saver:
        saver.save(1, make_state(1), config={}, metrics={"eval/elbo": 9.0})
        saver.save(2, make_state(2), config={}, metrics={"eval/elbo": 1.0})
        saver.wait()
        with monkeypatch.context() as patch:
            failing_open(patch, "checkpoints/1/meta", errno.EIO)
            saver.save(3, make_state(3), config={}, metrics={"eval/elbo": 2.0})
            saver.wait()
        assert sorted(storage.steps(tmp_path / "checkpoints")) == [1, 2, 3]
        assert "no old checkpoint is deleted" in caplog.text
        saver.save(4, make_state(4), config={}, metrics={"eval/elbo": 2.0})
    assert sorted(storage.steps(tmp_path / "checkpoints")) == [1, 4]


def test_a_json_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with monkeypatch.context() as patch:
        failing_open(patch, "config.json", errno.EIO)
        with pytest.raises(UserError, match="cannot be read") as caught:
            files.read_json(tmp_path / "config.json")
    assert "damaged" not in str(caught.value)


# Checkpoints that are lost.


@pytest.mark.parametrize("lost", ["the directory", "its content"])
def test_lost_checkpoints_do_not_begin_at_step_0(copy, lost):
    shutil.rmtree(copy)
    if lost == "its content":
        copy.mkdir()
    assert are_lost(copy)
    with pytest.raises(UserError, match="are lost"):
        restore(copy)


def test_a_run_without_a_checkpoint_has_lost_nothing(tmp_path):
    assert not are_lost(tmp_path / "checkpoints")
    with Checkpointer(tmp_path / "checkpoints") as saver:
        assert saver.restore(abstract(make_state(0))) is None


def test_a_finished_run_of_an_older_version_has_saved(copy: pathlib.Path):
    for path in copy.parent.glob(".*.newest"):
        path.unlink()
    (copy.parent / "result.json").write_text("{}")
    assert not are_lost(copy)
    shutil.rmtree(copy)
    assert are_lost(copy)
