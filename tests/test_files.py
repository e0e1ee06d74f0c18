"""`files`: errors in one line, locks between processes, and writes that are whole or absent."""

import errno
import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from svae_jax import files
from svae_jax.errors import UserError


def test_errors_say_what_failed_why_where_and_what_to_do(tmp_path):
    missing = tmp_path / "missing"
    with (
        pytest.raises(UserError) as error,
        files.os_errors_for_user("--workdir=runs/a cannot be read", "choose another"),
    ):
        missing.read_bytes()
    why = f"No such file or directory ({missing})"
    assert str(error.value) == f"--workdir=runs/a cannot be read: {why}; choose another"
    with pytest.raises(UserError) as error, files.os_errors_for_user(f"cannot read {missing}"):
        missing.read_bytes()
    assert str(error.value) == f"cannot read {missing}: No such file or directory"


def test_other_errors_pass():
    with pytest.raises(KeyError, match="the cause"), files.os_errors_for_user("anything"):
        raise KeyError("the cause")


def test_reasons_are_one_short_line():
    assert files.reason(ValueError("a\n b [tensorstore_spec='c']")) == "a b"
    assert files.reason(RuntimeError("{{node x}} it broke")) == "it broke"
    assert files.reason(KeyError()) == "KeyError"
    long = files.reason(ValueError("begin " + "x" * 1000 + " end"))
    assert long.startswith("begin ")
    assert long.endswith(" end")
    assert len(long) < 510


HOLDER = """
import sys, time
from pathlib import Path
from svae_jax import files
with files.lock(Path(sys.argv[1]), wait=True) as held:
    print(held, flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["flock", "no flock"])
def holder(request, tmp_path, monkeypatch):
    """A process that holds a lock, with and without the file system's own locks."""
    code = HOLDER
    if request.param == "no flock":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        code = (
            f"import fcntl\ndef refuse(*_): raise OSError({errno.ENOLCK}, 'none')\n"
            "fcntl.flock = refuse\n" + HOLDER
        )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_has_one_holder_and_dies_with_it(holder, tmp_path):
    path = tmp_path / "a.lock"
    with files.lock(path, wait=False) as held:
        assert not held
    waited = []

    def wait():
        with files.lock(path, wait=True) as held:
            waited.append(held)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    assert not waited
    holder.kill()
    holder.wait()
    thread.join(20)
    assert waited == [True]
    with files.lock(path, wait=False) as held:
        assert held


def test_a_lock_that_cannot_be_made_is_an_os_error():
    with pytest.raises(OSError, match="No such file"), files.lock(Path("/proc/a"), wait=False):
        pass


def _write_and_fail(path):
    with files.replacing(path) as file:
        file.write(b"new")  # stays in the buffer until the file is closed
        raise KeyError


def test_a_replaced_file_is_the_new_one_or_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    with files.replacing(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyError):
        _write_and_fail(path)
    assert path.read_bytes() == b"old"
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


def test_the_error_of_a_full_disk_is_not_hidden_by_closing(tmp_path):
    (tmp_path / "a.tmp").symlink_to("/dev/full")
    with pytest.raises(KeyError):
        _write_and_fail(tmp_path / "a")
    (tmp_path / "a.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), files.replacing(tmp_path / "a") as file:
        file.write(b"x")
