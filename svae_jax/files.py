"""Files: errors in one line, locks between processes, writes that are whole or absent, JSON."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from absl import logging

from svae_jax.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers


def reason(error: BaseException) -> str:
    """Returns an error's message as one line, without the internals of the library it comes from.

    TensorFlow puts its own in front of `}} `, tensorstore appends them in brackets.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.rpartition("}} ")[2]
    text = text.partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
    text = " ".join(text.split())
    # A long message begins with what happened and ends with the cause.
    text = text if len(text) <= 500 else f"{text[:200]} … {text[-300:]}"
    return text or type(error).__name__


@contextlib.contextmanager
def os_errors_for_user(subject: str, cure: str = "") -> Iterator[None]:
    """Re-raises OSError as a UserError that says what to do.

    Args:
        subject: what failed, such as "--workdir=runs/a cannot be written".
        cure: what the user can do about it.

    Raises:
        UserError: "<subject>: <reason>; <cure>".
    """
    try:
        yield
    except OSError as error:
        file = str(error.filename or "")
        where = f" ({file})" if file not in subject else ""
        raise UserError(f"{subject}: {reason(error)}{where}{cure and f'; {cure}'}") from error


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns a path that a user gives, absolute, with `~` expanded.

    Args:
        path: a file or directory of this machine.
        name: of the flag or argument, such as "--workdir".

    Raises:
        UserError: it is empty, or of another kind than a path of this machine.
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError(f"{name}= is empty: give a path")
    if "://" in text:
        raise UserError(f"{name}={text} is not a path of this machine's file systems: give one")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"{name}={text}: {error}; write the path out") from None


def has_home() -> bool:
    """Whether the user has a home; without one libraries take `~` for the name of a directory."""
    return os.path.expanduser("~") != "~"


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds the lock file `path`, so that no other process does; a killed process holds none.

    Args:
        path: the lock file, which stays.
        wait: wait for another process that holds the lock.

    Yields:
        Whether the lock is held: False if `wait` is False and another process holds it.

    Raises:
        OSError: the lock file cannot be made.
    """
    import filelock

    path.touch()  # filelock takes a path that cannot be written for one that is held
    held: filelock.BaseFileLock = filelock.FileLock(path)
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(held.acquire(timeout=0))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                held = filelock.SoftFileLock(f"{path}.soft")  # a file that exists while it is held
                stack.enter_context(held.acquire(timeout=0))
        except filelock.Timeout:
            if not wait:
                yield False
                return
            logging.info("waiting for another process that holds %s", path)
            stack.enter_context(held.acquire())
        yield True


def check_room(directory: Path, num_bytes: int) -> None:
    """Checks that a file of this size fits the disk, before hours of work are in vain.

    Raises:
        OSError: it does not.
    """
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise OSError(f"it takes {num_bytes / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB are free")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` once the block ends without an error.

    The file is flushed to disk and then renamed, so `path` is the old file or the new one, whole.
    One process at a time may replace a path.

    Raises:
        OSError: it cannot be written; nothing is left of the new file.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        file = temporary.open("wb")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):  # the error that ended the block says more
                file.close()
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every operating system opens directories
            sync(path.parent)  # makes the rename last
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk; not every file system can flush directories.

    Raises:
        OSError: the file cannot be flushed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, cure: str = "use another --workdir") -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if there is no such file.

    Args:
        path: the file.
        cure: what the user can do if it is damaged.

    Raises:
        UserError: the file cannot be read or holds no JSON object.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {reason(error)}; fix this and run the same command again"
        ) from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {cure}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; {cure}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a file, atomically and durably, by the JSON of `content`.

    Raises:
        UserError: the file cannot be written; the old one, if any, is still there.
    """
    with os_errors_for_user(f"{path} cannot be written"), replacing(path) as file:
        file.write(f"{json.dumps(content, indent=2)}\n".encode())
