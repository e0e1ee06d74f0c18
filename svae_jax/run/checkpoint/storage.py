"""Writes and reads the files of a step through Orbax, and lists the complete steps."""

import asyncio
import contextlib
import gc
import hashlib
import json
import logging as std_logging
import os
import pathlib
import shutil
import threading
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from svae_jax import files
from svae_jax.run.checkpoint.arrays import PyTree

NO_LIST = "no list"

_DELETED = ".deleted"
_LIST = "sha256.json"


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax's logging: its errors also arrive as exceptions, which become one line."""

    def is_ours(record: Any) -> bool:
        return record.name != "asyncio" and f"{os.sep}orbax{os.sep}" not in record.pathname

    loggers = (logging.get_absl_logger(), std_logging.getLogger("asyncio"))
    for logger in loggers:
        logger.addFilter(is_ours)
    try:
        yield
    except Exception as error:
        # After the first error Orbax's threads still run, write and log their own errors.
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax"):
                thread.join(timeout=60)
        # The frames hold other failed tasks, and asyncio logs each when it is freed: free them now.
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        gc.collect()
        raise  # the filter stays: some threads may not have started yet
    for logger in loggers:
        logger.removeFilter(is_ours)


@_quiet_orbax()
def save(path: pathlib.Path, state: PyTree, meta: dict[str, Any]) -> None:
    """Writes a step to a temporary directory and renames it, in this thread.

    Each save opens a new manager, which takes 3 ms. A manager that is kept would silently refuse
    older steps after a quarantine, and forget old steps after a failed save.
    """
    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        save_root_metadata=False,
        # With its processes named, Orbax synchronises through the coordinator. By default it uses
        # collectives, which must not run in a background thread beside the training step's.
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
    )
    handlers = {"state": _array_handler(), "meta": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    with ocp.CheckpointManager(path.parent, item_handlers=handlers, options=options) as manager:
        if not manager.save(int(path.name), args=items):
            raise RuntimeError("Orbax refuses it: a newer step is there")
    if is_first_process():
        _list_files(path)


@_quiet_orbax()
def read(path: pathlib.Path) -> PyTree:
    """Reads the arrays, unverified, as NumPy arrays in nested dictionaries and lists."""
    return ocp.Checkpointer(_array_handler()).restore(path)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Creates a new handler for each use: a cached one could return a replaced step's arrays."""
    types = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _NumpyHandler(deepcopy_host_arrays=False)),
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(),
        ),  # unused, but Orbax warns if it is missing
    )
    # Compression would take several times as long as everything else and save 8%.
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Waits for every read or write before it raises the first error.

    Orbax leaves the others running. They could write files again after the failed save was removed,
    and they print tracebacks because their event loop is closed.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        read = super().deserialize
        alone = [read([info], args and [args[i]]) for i, info in enumerate(infos)]
        return [array for (array,) in await _all(alone)]

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        # A private method: if Orbax renames it, only this protection is lost.
        write = super()._background_serialize
        await _all([write([v], [i], [a]) for v, i, a in zip(values, infos, args, strict=True)])


async def _all(coroutines: list[Any]) -> list[Any]:
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# Files.


def steps(folder: pathlib.Path) -> list[int]:
    """Lists the complete steps: Orbax renames `<step>.orbax-checkpoint-tmp` at the end of a save.

    Raises:
      UserError: the directory cannot be read.
    """
    with files.os_errors_for_user(f"cannot read {folder}"):
        try:
            # An entry's `is_dir` raises what `Path.is_dir` may take for False.
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [int(name) for name in names if name.isdecimal() and str(int(name)) == name]


def sweep(folder: pathlib.Path) -> None:
    """Removes what unfinished saves and deletions left, where it can."""
    if is_first_process():
        for pattern in (f"*{ocp.path.step.TMP_DIR_SUFFIX}*", f"*{_DELETED}"):
            for path in folder.glob(pattern):
                if path.name.partition(".")[0].isdecimal():  # no one else's
                    shutil.rmtree(path, ignore_errors=True)


def delete(folder: pathlib.Path, steps: Iterable[int]) -> None:
    """Deletes steps, then sweeps."""
    for step in steps:
        # Renamed first, so that a half-deleted step is never listed.
        (folder / str(step)).rename(folder / f"{step}{_DELETED}")
    sweep(folder)


def _list_files(path: pathlib.Path) -> None:
    """Lists the files of a step with their SHA-256, in the step."""
    hashes = {name: _sha256(path / name) for name in _needed(path)}
    (path / _LIST).write_text(json.dumps(hashes, indent=2))


def changed_file(path: pathlib.Path) -> str | None:
    """Returns a file of a step that is missing, foreign or not of its SHA-256; None if none is.

    Returns `NO_LIST` if the step has no such list: it is of an older version, or the save was
    killed.

    Raises:
      OSError: a file is there and cannot be read.
    """
    try:
        hashes = json.loads((path / _LIST).read_bytes())
    except (FileNotFoundError, ValueError):
        for name in _needed(path):  # which raises if one cannot be read
            _sha256(path / name)
        return NO_LIST
    differing = hashes.keys() ^ _needed(path)
    for name in hashes.keys() - differing:
        if _sha256(path / name) != hashes[name]:
            differing.add(name)
    return min(differing, default=None)


def _needed(path: pathlib.Path) -> list[str]:
    """The files of the arrays; Orbax's marks of completion are not read."""
    found = (file for file in (path / "state").rglob("*") if file.is_file())
    names = (file.relative_to(path).as_posix() for file in found)
    return sorted(name for name in names if not name.endswith("commit_success.txt"))


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: pathlib.Path) -> None:
    """Flushes a step to disk, so that older ones can be deleted; raises late disk errors."""
    for file in (*path.rglob("*"), path, path.parent):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not file.is_dir():  # not every file system can flush directories
                raise
        finally:
            os.close(descriptor)


def is_first_process() -> bool:
    """Returns whether this is the process that moves, flushes and deletes files for all."""
    return jax.process_index() == 0
