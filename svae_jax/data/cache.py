"""Arrays on disk that are whole or absent: built once, hashed, then mapped into memory.

A file is a plain `.npy` followed by 32 bytes: the SHA-256 of the file's name and of all that comes
before. `np.load` reads it as it is, and so does any other reader of `.npy` files.
"""

import contextlib
import hashlib
import io
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from svae_jax.errors import UserError

_DIGEST_BYTES = 32
_HASHED_AT_A_TIME = 2**24


class _DamagedError(Exception):
    """A file that is there and is not what was written."""


def home() -> Path:
    """The package's directory among the user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svae_jax"


def open_or_build(
    path: Path, shape: tuple[int, ...], batches: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """Maps the uint8 array at `path` into memory, and builds it first where it is not intact.

    Args:
        path: The file. Its name must tell apart whatever could be asked for.
        shape: The array's shape.
        batches: Called only to build; yields consecutive parts of the array, cut along its first
            axis.

    Returns:
        A read-only array of `shape`.

    Raises:
        UserError: the directory cannot be written, or has too little room.
    """
    with contextlib.suppress(_DamagedError):
        if (array := _read(path, shape)) is not None:
            return array
    with lock(path) as alone:
        _remove_leftovers(path, alone)
        try:
            if (array := _read(path, shape)) is not None:
                return array  # another process has built it in the meantime
        except _DamagedError as err:
            logging.warning("cache file %s %s: building it again", path, err)
        _write(path, shape, batches)
    array = _read(path, shape)
    assert array is not None
    return array


def release(array: np.ndarray) -> None:
    """Takes the pages of a mapped array out of this process's memory; reading brings them back.

    The system would do so when memory grows short; until then, all that was read once counts as
    this process's. It does nothing for an array that is not mapped or may be written, whose changes
    would be lost, and where there is no madvise.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
        owner.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Waits until no other process holds the lock of `path`; a killed process holds none.

    Yields:
        False where the file system has no locks: then nothing is known about other processes.

    Raises:
        UserError: the directory of `path` cannot be written.
    """
    import fcntl  # absent on Windows, where reading a finished cache still works

    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(path.name + ".lock").open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            logging.info("waiting for another process to finish %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone


def _remove_leftovers(path: Path, alone: bool) -> None:
    """Removes what killed processes left half written: no living one writes for a whole day."""
    for leftover in path.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process may be faster
            own = alone and leftover.name.startswith(path.name)
            if own or time.time() - leftover.stat().st_mtime > 86_400:
                leftover.unlink()


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    with _told(path):
        if not path.exists():
            return None
        if path.stat().st_size <= _DIGEST_BYTES:
            raise _DamagedError("is cut short")
        raw = np.memmap(path, np.uint8, "r")
    hasher = _hash(path)
    for begin in range(0, len(raw) - _DIGEST_BYTES, _HASHED_AT_A_TIME):
        hasher.update(raw[:-_DIGEST_BYTES][begin : begin + _HASHED_AT_A_TIME].data)
        release(raw)
    if hasher.digest() != raw[-_DIGEST_BYTES:].tobytes():
        raise _DamagedError("does not match its hash")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as err:
        raise _DamagedError(f"is no array ({err})") from err
    if array.shape != shape or array.dtype != np.uint8:
        raise _DamagedError(f"holds {array.dtype}{list(array.shape)}, not uint8{list(shape)}")
    return array


def _write(path: Path, shape: tuple[int, ...], batches: Callable[[], Iterable[np.ndarray]]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    hasher = _hash(path)
    hasher.update(header.getvalue())
    needed = int(np.prod(shape)) + len(header.getvalue()) + _DIGEST_BYTES
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _told(path, needed):
            if needed > shutil.disk_usage(path.parent).free:  # rather now than after an hour
                raise OSError("there is too little room")
            file = temporary.open("xb")
        with file:
            with _told(path, needed):
                file.write(header.getvalue())
            rows = 0
            for batch in batches():  # its errors are the source's, not the cache's
                content = np.ascontiguousarray(batch, np.uint8)
                rows += len(content)
                hasher.update(content.data)
                with _told(path, needed):
                    file.write(content.data)
            if rows != shape[0]:
                raise ValueError(f"{rows} of {shape[0]} rows were given for {path}")
            with _told(path, needed):
                file.write(hasher.digest())
                file.flush()
                os.fsync(file.fileno())
        with _told(path, needed):
            temporary.replace(path)
            _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _hash(path: Path) -> "hashlib._Hash":
    """The name goes in, so that a file renamed to another key is not taken for that one."""
    return hashlib.sha256(path.name.encode())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns what the operating system says about the cache into what the user can do."""
    try:
        yield
    except OSError as err:
        raise UserError(
            f"dataset.cache_dir={str(path.parent)!r}: {err.strerror or err}"
            f"{_room(path.parent, needed)}; make it writable with room enough, or set "
            f"dataset.cache_dir to another directory"
        ) from err


def _room(directory: Path, needed: int) -> str:
    if not needed:
        return ""
    free = shutil.disk_usage(directory).free
    return f" ({needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free)"
