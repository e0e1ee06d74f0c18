"""The files of one step: written and read through Orbax, and listed with their SHA-256."""

import asyncio
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from svae_jax import files
from svae_jax.run.checkpoint import arrays
from svae_jax.run.checkpoint.arrays import PyTree

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

_DELETED = ".deleted"
_LIST = "sha256.json"
# How tensorstore begins, where a checksum is wrong or bytes are missing.
_STORAGE_DAMAGE = re.compile("(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION): ")


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax's logging: its errors also arrive as exceptions, which become one line."""

    def is_not_orbax(record: Any) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(is_not_orbax)
    try:
        yield
    except Exception:
        # After the first error Orbax's threads still run, write and log their own errors.
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax"):
                thread.join(timeout=60)
        raise  # the filter stays: some threads may not have started yet
    logger.removeFilter(is_not_orbax)


@_quiet_orbax()
def save(path: pathlib.Path, state: PyTree, meta: dict[str, Any], policy: Any) -> None:
    """Writes a step under a temporary name, renames it, and moves away what `policy` lets go.

    Each save opens a new manager, which takes 3 ms. A manager that is kept would silently refuse
    older steps after a quarantine, and forget old steps after a failed save.

    Args:
      path: of the step.
      state: NumPy arrays.
      meta: JSON values.
      policy: an Orbax preservation policy, which is asked once the step has its name.
    """
    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        save_root_metadata=False,
        preservation_policy=policy,
        # Moved first and removed by `sweep`, so that a half-deleted step is never listed.
        todelete_subdir=f"{path.name}{_DELETED}",
        # With its processes named, Orbax synchronises through the coordinator. By default it uses
        # collectives, which must not run in a background thread beside the training step's.
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
    )
    handlers = {"state": _array_handler(), "meta": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    with ocp.CheckpointManager(path.parent, item_handlers=handlers, options=options) as manager:
        if not manager.save(int(path.name), args=items):
            raise RuntimeError("Orbax refuses it: a newer step is there")


@_quiet_orbax()
def read(path: pathlib.Path) -> PyTree:
    """Reads the arrays, unverified, as NumPy arrays in nested dictionaries and lists."""
    return ocp.Checkpointer(_array_handler()).restore(path)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Creates a new handler for each use: a cached one could return a replaced step's arrays."""
    types = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _NumpyHandler(deepcopy_host_arrays=False))
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
        # Private, tested with Orbax 0.12.8: the public `serialize` would take a thread and an event
        # loop an array, 40% of a save. If Orbax renames it, only this protection is lost.
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
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def sweep(folder: pathlib.Path) -> None:
    """Removes what unfinished saves and deletions left, where it can."""
    if is_first_process():
        for pattern in (f"*{ocp.path.step.TMP_DIR_SUFFIX}*", f"*{_DELETED}"):
            for path in folder.glob(pattern):
                if path.name.partition(".")[0].isdecimal():  # no one else's
                    shutil.rmtree(path, ignore_errors=True)


def settle(path: pathlib.Path) -> None:
    """Lists the files of a new step in it, and flushes them to disk; raises late disk errors."""
    if is_first_process():
        (path / _LIST).write_text(json.dumps(_hashes(path), indent=2))
        for file in (*path.rglob("*"), path, path.parent):
            files.sync(file)


def damaged_file(path: pathlib.Path, error: Exception) -> str | None:
    """Returns a file of a step whose arrays cannot be read because of damage; None if it is intact.

    It is missing, foreign or not of its SHA-256. Where there is no list, in a step of an older
    version or of a run that was killed while saving, the error tells.

    Raises:
      OSError: a file is there and cannot be read.
    """
    found = _hashes(path)
    try:
        listed = dict(json.loads((path / _LIST).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        is_damage = isinstance(error, (*MISSING, json.JSONDecodeError, UnicodeDecodeError))
        is_damage |= type(error) is ValueError and bool(_STORAGE_DAMAGE.match(str(error)))
        return "state" if is_damage else None
    return next(iter(arrays.differing(listed, found)), None)


def _hashes(path: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of the arrays; Orbax's marks of completion are not read."""

    def fail(error: OSError) -> None:
        if not isinstance(error, MISSING):
            raise error

    found = {}
    for folder, _, names in os.walk(path / "state", onerror=fail):
        for name in set(names) - {"commit_success.txt"}:
            file = pathlib.Path(folder, name)
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            found[file.relative_to(path).as_posix()] = digest
    return found


def is_first_process() -> bool:
    """Returns whether this is the process that moves, flushes and deletes files for all."""
    return jax.process_index() == 0
