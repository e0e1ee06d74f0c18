"""Images in cached files: built once, checked, locked, mapped, and released."""

import errno
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from svae_jax import files
from svae_jax.data import cache
from svae_jax.errors import UserError

SHAPE = (6, 2, 2, 3)
ARRAY = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def never():
    raise AssertionError("built again")


def batches():
    return iter([ARRAY[:4], ARRAY[4:]])


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "array.npy"


@pytest.fixture
def built(path):
    cache.open_or_build(path, SHAPE, batches)
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_built_once_then_mapped(path):
    first = cache.open_or_build(path, SHAPE, batches)
    second = cache.open_or_build(path, SHAPE, never)
    for array in (first, second):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, ARRAY)
    np.testing.assert_array_equal(np.load(path), ARRAY)  # a plain .npy to anyone else
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.name + ".lock"]


def test_any_flipped_bit_is_noticed(built, caplog):
    good = built.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        built.write_bytes(bad)
        caplog.clear()
        np.testing.assert_array_equal(cache.open_or_build(built, SHAPE, batches), ARRAY)
        assert built.read_bytes() == good
        assert len(warnings(caplog)) == 1
        assert str(built) in warnings(caplog)[0]


DAMAGES = {
    "last byte cut off": lambda good: good[:-1],
    "half": lambda good: good[: len(good) // 2],
    "shorter than a hash": lambda good: good[:31],
    "empty": lambda good: b"",
    "zeros": lambda good: bytes(len(good)),
    "longer": lambda good: good + b"x",
    "two of it": lambda good: good + good,
    "another file": lambda good: b"not an array at all, but longer than a hash of 32 bytes is",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_built_again(built, damage, caplog):
    good = built.read_bytes()
    built.write_bytes(damage(good))
    np.testing.assert_array_equal(cache.open_or_build(built, SHAPE, batches), ARRAY)
    assert built.read_bytes() == good
    assert len(warnings(caplog)) == 1


def test_deleted_file_is_built_again_without_a_warning(built, caplog):
    built.unlink()
    np.testing.assert_array_equal(cache.open_or_build(built, SHAPE, batches), ARRAY)
    assert not warnings(caplog)


def test_a_file_of_another_name_shape_or_dtype_is_not_taken(built, caplog):
    other = built.with_name("other.npy")
    other.write_bytes(built.read_bytes())
    assert (
        cache.open_or_build(other, SHAPE, lambda: iter([255 - ARRAY]))[0, 0, 0, 0]
        != ARRAY[0, 0, 0, 0]
    )
    flat = cache.open_or_build(built, (72,), lambda: iter([ARRAY.ravel()]))
    assert flat.shape == (72,)
    halves = ARRAY.ravel() / 2
    floats = cache.open_or_build(built, (72,), lambda: iter([halves]), "float32")
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, halves)
    assert cache.open_or_build(built, (72,), never, "float32").dtype == np.float32
    assert len(warnings(caplog)) == 3


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def signed(path, content):
    return content + hashlib.sha256(path.name.encode() + content).digest()


def test_planted_pickle_executes_nothing(built, tmp_path):
    sprung = tmp_path / "sprung"
    as_array = io.BytesIO()
    np.save(as_array, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    for content in (as_array.getvalue(), pickle.dumps(Trap(sprung)) + b"." * 64):
        for file in (content, signed(built, content)):
            built.write_bytes(file)
            np.testing.assert_array_equal(cache.open_or_build(built, SHAPE, batches), ARRAY)
            assert not sprung.exists()
    np.load(io.BytesIO(as_array.getvalue()), allow_pickle=True)
    assert sprung.exists()  # so the trap works


def only_locks(directory):
    return all(file.name.endswith(".lock") for file in directory.iterdir())


def test_errors_of_the_source_pass_and_leave_nothing(path):
    def failing():
        yield ARRAY[:4]
        raise OSError(errno.EIO, "the source broke")

    with pytest.raises(OSError, match="the source broke"):
        cache.open_or_build(path, SHAPE, failing)
    with pytest.raises(ValueError, match="4 of 6 rows"):
        cache.open_or_build(path, SHAPE, lambda: iter([ARRAY[:4]]))
    assert only_locks(path.parent)


def test_too_little_room_is_told_before_building(small_disk):
    with pytest.raises(UserError, match=r"dataset\.cache_dir=.*1\.0 MB are free.*2\.0 MB") as e:
        cache.open_or_build(small_disk / "a.npy", (2_000_000,), never)
    assert str(small_disk) in str(e.value)
    assert only_locks(small_disk)


def test_disk_that_fills_up_leaves_nothing(small_disk, monkeypatch):
    path, big = small_disk / "a.npy", np.zeros(900_000, np.uint8)
    plenty = SimpleNamespace(free=10**9)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(300_000))
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: plenty)
        with pytest.raises(UserError, match=r"No space left on device.*0\.9 MB"):
            cache.open_or_build(path, big.shape, lambda: iter(np.split(big, 9)))
    filler.unlink()
    assert only_locks(small_disk)
    assert len(cache.open_or_build(path, big.shape, lambda: iter([big]))) == len(big)


def test_read_only_directory_is_read_and_not_written(small_disk):
    path = small_disk / "array.npy"
    cache.open_or_build(path, SHAPE, batches)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    np.testing.assert_array_equal(cache.open_or_build(path, SHAPE, never), ARRAY)
    with pytest.raises(UserError, match=r"dataset\.cache_dir=.*Read-only"):
        cache.open_or_build(small_disk / "other.npy", SHAPE, batches)


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere"])
def test_impossible_directory(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.cache_dir="):
        cache.open_or_build(tmp_path / place / "a.npy", SHAPE, batches)


BUILDER = """
import os, signal, sys, time
import numpy as np
from pathlib import Path
from svae_jax.data import cache
path, log, die = Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
def batches():
    with log.open("a") as file:
        file.write("built\\n")
    for row in range(20):
        if die and row == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.03)
        yield np.full((1, 5), row, np.uint8)
array = cache.open_or_build(path, (20, 5), batches)
assert (array == np.arange(20)[:, None]).all()
"""


def start_builder(*arguments):
    return subprocess.Popen([sys.executable, "-c", BUILDER, *map(str, arguments)])


def test_processes_build_one_array_once(tmp_path):
    path, log = tmp_path / "a.npy", tmp_path / "log"
    processes = [start_builder(path, log) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert not list(tmp_path.glob("*.tmp"))


def test_killed_builder_leaves_no_lock_and_its_leftover_goes(tmp_path):
    path, log = tmp_path / "a.npy", tmp_path / "log"
    assert start_builder(path, log, "die").wait(60) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert start_builder(path, log).wait(60) == 0
    assert not list(tmp_path.glob("*.tmp"))


def test_leftovers_of_other_arrays_go_after_a_day(path):
    path.parent.mkdir()
    old, young = path.with_name("old.npy.0.tmp"), path.with_name("young.npy.0.tmp")
    old.touch()
    young.touch()
    day_ago = time.time() - 86_500
    os.utime(old, (day_ago, day_ago))
    cache.open_or_build(path, SHAPE, batches)
    assert not old.exists()
    assert young.exists()


def _resident_bytes(path):
    """How much of a mapped file counts as this process's memory, as Linux tells it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    kilobytes = 0
    for line in lines:
        if line.endswith(str(path)):
            kilobytes += next(int(entry.split()[1]) for entry in lines if entry.startswith("Rss:"))
    return 1024 * kilobytes


linux = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="Linux tells of mapped files"
)


@linux
def test_released_pages_leave_the_process_and_come_back(tmp_path):
    path = tmp_path / "big.npy"
    np.save(path, np.arange(2**24, dtype=np.uint8))
    whole = np.load(path, mmap_mode="r")
    part = whole[10:]
    total = int(whole.sum(dtype=np.int64))
    assert _resident_bytes(path) > 2**23
    cache.release(part)  # whichever view of it
    assert _resident_bytes(path) < 2**20
    assert int(whole.sum(dtype=np.int64)) == total
    cache.release(np.zeros(3))  # is not mapped, and stays
    changed = np.load(path, mmap_mode="c")
    changed[:] = 7
    cache.release(changed)
    assert np.all(changed == 7)


@linux
def test_checking_a_file_does_not_gather_it_in_memory(path, monkeypatch):
    resident = []

    class Watched:
        """A hash that notes what is in memory of the file when it is given the next piece."""

        def __init__(self, name):
            self.sha256 = hashlib.sha256(name)
            self.digest = self.sha256.digest

        def update(self, piece):
            resident.append(_resident_bytes(path))
            self.sha256.update(piece)

    big = np.zeros((2**25,), np.uint8)
    cache.open_or_build(path, big.shape, lambda: iter([big]))
    monkeypatch.setattr(cache, "hashlib", SimpleNamespace(sha256=Watched))
    assert len(cache.open_or_build(path, big.shape, never)) == len(big)
    assert len(resident) > 1
    assert max(resident) < 2**20
