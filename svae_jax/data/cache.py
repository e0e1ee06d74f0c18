"""Arrays on disk: built once, verified by a hash, and mapped into memory.

A file is a plain `.npy` followed by 32 bytes, the SHA-256 of the file's name and of the bytes
before. `np.load` and other readers of `.npy` files ignore these 32 bytes.
"""

import contextlib
import hashlib
import io
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging

from svae_jax import files
from svae_jax.errors import UserError

_DIGEST_BYTES = 32
_HASHED_AT_A_TIME = 2**24


class _DamagedError(Exception):
    """A file exists and differs from what was written."""


def home() -> Path:
    """Returns the package's directory in the user's cache.

    Raises:
        UserError: the user has no home, as in a container of an unknown user.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svae_jax"
    except RuntimeError:
        raise UserError(
            "dataset.cache_dir='' is in the home directory, and this user has none: set "
            "dataset.cache_dir or the variable XDG_CACHE_HOME to a directory"
        ) from None


def open_or_build(
    path: Path,
    shape: tuple[int, ...],
    batches: Callable[[], Iterable[np.ndarray]],
    dtype: str = "uint8",
) -> np.ndarray:
    """Maps the array at `path` into memory; builds the file first if it is not intact.

    Args:
        path: the file; its name must identify the array.
        shape: the array's shape.
        batches: called only to build; yields consecutive parts of the array along its first axis.
        dtype: the array's, of this machine's byte order.

    Returns:
        A read-only array of `shape`.

    Raises:
        UserError: the directory cannot be written, or has too little room.
    """
    with contextlib.suppress(_DamagedError):
        if (array := _read(path, shape, dtype)) is not None:
            return array
    with lock(path):
        _remove_leftovers(path.parent)
        try:
            if (array := _read(path, shape, dtype)) is not None:
                return array  # another process has built it in the meantime
        except _DamagedError as err:
            logging.warning("cache file %s %s: building it again", path, err)
        _write(path, shape, batches, dtype)
    array = _read(path, shape, dtype)
    assert array is not None
    return array


def release(array: np.ndarray) -> None:
    """Drops the pages of a mapped array from this process's memory; reading loads them again.

    The system would drop them only when memory runs short, and count them as this process's until
    then. This does nothing for an array that is not mapped, for a writable one, whose changes would
    be lost, and without madvise.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
        owner.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Waits until no other process holds the lock of `path`, and holds it.

    Raises:
        UserError: the directory of `path` cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _errors_for_user(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(path.with_name(f"{path.name}.lock"), wait=True))
        yield


def _remove_leftovers(directory: Path) -> None:
    """Removes unfinished files that no process has written to for a day."""
    for leftover in directory.glob("*.npy*.tmp"):  # others' files may be here too
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - leftover.stat().st_mtime > 86_400:
                leftover.unlink()


def _read(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    hasher = _hash(path)
    with _errors_for_user(path):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        # Read, not mapped: an error of the disk then is an exception, and no signal.
        with file:
            left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            if left <= 0:
                raise _DamagedError("is cut short")
            while left and (part := file.read(min(left, _HASHED_AT_A_TIME))):
                hasher.update(part)
                left -= len(part)
            if left or hasher.digest() != file.read():
                raise _DamagedError("does not match its hash")
    try:
        with _errors_for_user(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as err:
        raise _DamagedError(f"is no array ({err})") from err
    if array.shape != shape or array.dtype != dtype:
        raise _DamagedError(f"holds {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}")
    return array


def _write(
    path: Path, shape: tuple[int, ...], batches: Callable[[], Iterable[np.ndarray]], dtype: str
) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    )
    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize + len(header.getvalue()) + _DIGEST_BYTES
    hasher, rows = _hash(path), 0
    with contextlib.ExitStack() as stack:
        with _errors_for_user(path, needed):
            files.check_room(path.parent, needed)
            file = stack.enter_context(files.replacing(path))

        def write(content: memoryview) -> None:
            hasher.update(content)
            with _errors_for_user(path, needed):
                file.write(content)

        write(header.getbuffer())
        for batch in batches():  # outside `_errors_for_user`: its errors are not the cache's
            rows += len(batch)
            write(np.ascontiguousarray(batch, dtype).data)
        if rows != shape[0]:
            raise ValueError(f"{rows} of {shape[0]} rows were given for {path}")
        with _errors_for_user(path, needed):
            file.write(hasher.digest())
            stack.close()


def _hash(path: Path) -> "hashlib._Hash":
    """A SHA-256 that includes the file's name, so that a renamed file is not taken for another."""
    return hashlib.sha256(path.name.encode())


def _errors_for_user(path: Path, needed: int = 0) -> contextlib.AbstractContextManager[None]:
    room = f" with room for {needed / 1e6:,.1f} MB" if needed else ""
    return files.os_errors_for_user(
        f"dataset.cache_dir={str(path.parent)!r}",
        f"make it writable{room}, or set dataset.cache_dir to another directory",
    )
