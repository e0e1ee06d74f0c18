"""Checkpoints that are verified: what is restored is what was saved, or nothing is.

Each step is one Orbax checkpoint `directory/<step>` of two items: `state`, the arrays, and `meta`,
a JSON object of the configuration, the versions of the libraries, the metrics and a SHA-256 over
every array, sealed by a SHA-256 over itself. Orbax alone restores a flipped bit silently and casts
a wrong dtype silently.

The state is saved as NumPy arrays, copied to the host once. So the next train step may reuse the
device's buffers at once, hashing and writing happen in a background thread, and a checkpoint does
not depend on the devices it was saved from.
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from svae_jax.errors import UserError

PyTree = Any
Directory = str | os.PathLike[str]

_FORMAT = 1
_SCORE = "eval/elbo"
_DELETED = ".deleted"
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


class Loaded(NamedTuple):
    """A verified checkpoint: its step, state, configuration and metrics."""

    step: int
    state: PyTree
    config: dict[str, Any]
    metrics: dict[str, float]


class _DamagedError(Exception):
    """A step does not hold what was saved; the message names the file or array."""


class Checkpointer:
    """Saves the states of a run in the background, and restores the newest intact one.

    Kept are the newest `keep` steps and the best by the metric `eval/elbo`. Only one Checkpointer
    at a time may write to a directory. Use it as a context manager, or call `close`: an error of
    the last save is known only then.

    Args:
      directory: where the steps stand; made by the first save.
      keep: how many of the newest steps to keep, at least 1.

    Raises:
      UserError: `keep` is less than 1.
    """

    def __init__(self, directory: Directory, *, keep: int = 3):
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep}: at least one checkpoint must be kept")
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._pending: concurrent.futures.Future[None] | None = None
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Checkpointer":
        """Nothing but the object itself."""
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """Closes; an error of the last save does not hide an exception on its way out."""
        try:
            self.close()
        except UserError as error:
            if exc is None:
                raise
            logging.error("%s", error)

    def latest_step(self) -> int | None:
        """The newest step that was saved completely, not yet verified; None where there is none."""
        return max(_steps(self._directory), default=None)

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        config: dict[str, Any],
        metrics: dict[str, Any] | None = None,
    ) -> None:
        """Copies the state to the host and writes it in the background.

        Waits for the previous save first. When this returns, the state's buffers may be donated.

        Args:
          step: newer than every step there is.
          state: a pytree of arrays; in a run of several processes, the same in each.
          config: what `restore` compares; anything JSON holds.
          metrics: numbers by name; with `eval/elbo` among them the step may become the best.

        Raises:
          UserError: the previous save failed (this one was not begun; saving may go on), or the
            step is not newer than all others.
          TypeError: the configuration is nothing that JSON holds, or a metric is no number.
        """
        self.wait()
        step, latest = int(step), self.latest_step()
        if latest is not None and step <= latest:
            raise UserError(
                f"cannot save step {step}: {self._directory / str(latest)} is there already; "
                "go on from it, or use another workdir"
            )
        meta = {
            "format": _FORMAT,
            "step": step,
            "config": _as_json(config),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
        self._pending = self._worker.submit(self._write, step, _to_host(state), meta)

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
          UserError: the save failed; the message tells which steps are still there.
        """
        if self._pending is not None:
            concurrent.futures.wait([self._pending])  # an interrupt here forgets nothing
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits until nothing is being written, and ends the background thread.

        Raises:
          UserError: the save failed; the message tells which steps are still there.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def restore(
        self, target: PyTree, *, config: dict[str, Any] | None = None
    ) -> tuple[int, PyTree] | None:
        """The newest intact step and its state, placed as the target's shardings say.

        A damaged step is moved to `quarantine/` with a warning, and the one before it is taken.

        Args:
          target: arrays or `jax.ShapeDtypeStruct`s, in the structure of the state that was saved.
          config: compared with the one saved, if given.

        Returns:
          None where no step was ever saved.

        Raises:
          UserError: the checkpoint is of another configuration or of other arrays than the target
            (it is left alone), it may not be read, or steps are there and all are damaged.
        """
        self.wait()
        for step in sorted(_steps(self._directory), reverse=True):
            try:
                return _load_step(self._directory, step, target, config)[:2]
            except _DamagedError as error:
                self._quarantine(step, error)
        quarantine = self._directory / "quarantine"
        # Also at the next try, when none but those in quarantine is left: never a silent step 0.
        if quarantine.is_dir() and any(quarantine.iterdir()):
            raise UserError(
                f"no intact checkpoint in {self._directory}: all are damaged and in {quarantine}; "
                "use another workdir, or delete the quarantine to begin again at step 0"
            )
        return None

    def _quarantine(self, step: int, error: _DamagedError) -> None:
        """Moves a damaged step out of the way, for whoever wants to look."""
        if not _is_first_process():
            return
        source, folder = self._directory / str(step), self._directory / "quarantine"
        goal, copies = folder / str(step), 1
        while goal.exists():
            copies += 1
            goal = folder / f"{step}-{copies}"
        logging.warning("checkpoint %s is damaged (%s): moved to %s", source, error, goal)
        try:
            folder.mkdir(exist_ok=True)
            source.rename(goal)
        except OSError as cause:
            raise UserError(f"cannot move {source} to {goal}: {_reason(cause)}") from cause

    def _write(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Hashes and writes one step and deletes old ones, in the background."""
        path = self._directory / str(step)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _sweep(self._directory)
            meta["arrays"] = {name: _describe(leaf) for name, leaf in _leaves(state).items()}
            _orbax_save(path, state, meta | {"seal": _digest(meta)})
            if _is_first_process():
                _flush(path)
                self._delete_old()
        except Exception as error:
            _sweep(self._directory)  # what was written so far may be what fills the disk
            raise UserError(
                f"cannot save {path}: {_reason(error)}; steps still there: "
                f"{sorted(_steps(self._directory))}; mend that and run the same command again"
            ) from error

    def _delete_old(self) -> None:
        steps = sorted(_steps(self._directory))
        best = max(steps, key=lambda step: (_score(self._directory, step), step))
        for step in set(steps[: -self._keep]) - {best}:
            # Renamed first: a step half deleted must never be on offer.
            (self._directory / str(step)).rename(self._directory / f"{step}{_DELETED}")
        _sweep(self._directory)


def load(directory: Directory, target: PyTree | None = None, *, best: bool = False) -> Loaded:
    """Reads the newest (or best) intact step and changes nothing, even beside a run that writes.

    Args:
      directory: where the steps stand.
      target: arrays or `jax.ShapeDtypeStruct`s, in the structure of the state that was saved; None
        for NumPy arrays in nested dictionaries and lists.
      best: the one with the highest `eval/elbo`; the newest where none has it.

    Raises:
      UserError: there is no step, none is intact, it may not be read or does not fit the target.
    """
    folder = pathlib.Path(directory).absolute()
    tried: set[int] = set()
    while steps := set(_steps(folder)) - tried:
        step = max(steps, key=lambda step: (_score(folder, step) if best else 0, step))
        tried.add(step)
        try:
            return _load_step(folder, step, target, None)
        except _DamagedError as error:
            if (folder / str(step)).exists():  # else the run has just deleted it
                logging.warning("checkpoint %s/%d is damaged (%s): left out", folder, step, error)
    raise UserError(
        f"no {'intact ' if tried else ''}checkpoint in {folder}: give the `checkpoints` directory "
        "of a run that has saved"
    )


def fingerprint(state: PyTree) -> str:
    """A SHA-256 over a state's paths, dtypes, shapes and bytes: the same only for equal states."""
    return _digest({name: _describe(leaf) for name, leaf in _leaves(_to_host(state)).items()})


# Reading and verifying one step.


def _load_step(
    folder: pathlib.Path, step: int, target: PyTree | None, config: dict[str, Any] | None
) -> Loaded:
    """One verified step; a user's mistake is found before any array is read.

    Raises:
      UserError: the step is of another configuration or of other arrays, or may not be read.
      _DamagedError: the step is not what was saved.
    """
    meta, path = _read_meta(folder, step), folder / str(step)
    if config is not None:
        _compare(path, "configuration", _fields(meta["config"]), _fields(_as_json(config)))
    if target is not None:
        wanted = {name: f"{leaf.dtype}{[*leaf.shape]}" for name, leaf in _leaves(target).items()}
        saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in meta["arrays"].items()}
        _compare(path, "model", saved, wanted)
    state = _read_state(path, meta["arrays"])
    if target is not None:
        arrays = _leaves(state)
        ordered = [arrays[name] for name in _leaves(target)]
        shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(target)]
        placed = jax.device_put(ordered, shardings)
        state = jax.tree.unflatten(jax.tree.structure(target), placed)
    return Loaded(step, state, meta["config"], meta["metrics"])


def _read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    path = folder / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        seal = meta.pop("seal")
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    except Exception as error:  # whatever it is: these are not the bytes that were written
        raise _DamagedError(f"meta/metadata: {_reason(error)}") from error
    if seal != _digest(meta):
        raise _DamagedError("meta/metadata does not match its SHA-256")
    if meta["format"] != _FORMAT:
        raise UserError(
            f"{path} has format={meta['format']}, this svae_jax reads format={_FORMAT}: "
            "install the version that wrote it"
        )
    if meta["step"] != step:
        raise _DamagedError(f"meta/metadata is of step {meta['step']}")
    return meta


def _read_state(path: pathlib.Path, saved: dict[str, Any]) -> PyTree:
    """The arrays of a step in nested dictionaries and lists, each as it was hashed."""
    try:
        state = _orbax_read(path / "state")
        found = {name: _describe(leaf) for name, leaf in _leaves(state).items()}
    except MemoryError:
        raise
    except Exception as error:
        for file in path.rglob("*"):
            if file.exists() and not os.access(file, os.R_OK):
                raise UserError(f"cannot read {file}: permission denied") from error
        text = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        raise _DamagedError(f"state{'/_METADATA' if text else ''}: {_reason(error)}") from error
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise _DamagedError(f"state: the array {name} does not match its SHA-256")
    return state


def _score(folder: pathlib.Path, step: int) -> float:
    """A step's `eval/elbo`; minus infinity where it has none."""
    try:
        score = _read_meta(folder, step)["metrics"][_SCORE]
    except (UserError, _DamagedError, KeyError):
        return -math.inf
    return score if math.isfinite(score) else -math.inf


def _compare(path: pathlib.Path, what: str, saved: dict[str, str], given: dict[str, str]) -> None:
    changed = [
        f"{name}={given.get(name, 'absent')} (saved: {saved.get(name, 'absent')})"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{path} is of another {what}: {', '.join(changed[:5])}{more}; "
            "set it back, or use another workdir"
        )


# Orbax.


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops what Orbax logs: what matters of it comes as an exception too, and in one line."""

    def is_ours(record: Any) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)


@_quiet_orbax()
def _orbax_save(path: pathlib.Path, state: PyTree, meta: dict[str, Any]) -> None:
    """Writes a step to a temporary directory and renames it, all of it in this thread.

    A manager lives for one save only (opening it takes 3 ms): one that is kept would refuse older
    steps silently after a quarantine, and forget old steps after a failed save.
    """
    processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        save_root_metadata=False,
        # Named processes meet at the coordinator's barriers. By default Orbax uses collectives,
        # which must not run in a background thread beside those of the train step.
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
    )
    handlers = {"state": _array_handler(), "meta": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    with ocp.CheckpointManager(path.parent, item_handlers=handlers, options=options) as manager:
        if not manager.save(int(path.name), args=items):
            raise RuntimeError("Orbax refuses it: a newer step is there")


@_quiet_orbax()
def _orbax_read(path: pathlib.Path) -> PyTree:
    """NumPy arrays in nested dictionaries and lists, as they are on disk, not yet verified."""
    return ocp.Checkpointer(_array_handler()).restore(path)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """New for each use: nothing cached before a step was replaced may be read again."""
    types = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _NumpyHandler(deepcopy_host_arrays=False)),
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(),
        ),  # unused, but Orbax warns where it is missing
    )
    # Compression would take several times as long as all the rest, for 8% of the size.
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Lets every read or write end before the first error is raised.

    Orbax leaves the others running. A write among them may make files again that were just removed
    with the failed save, and whatever ends later prints a traceback, as its event loop is closed.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        read = super().deserialize
        alone = [read([info], args and [args[i]]) for i, info in enumerate(infos)]
        return [array for (array,) in await _all(alone)]

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        # Not public: where Orbax has another name for it, just that protection is lost.
        write = super()._background_serialize
        await _all([write([v], [i], [a]) for v, i, a in zip(values, infos, args, strict=True)])


async def _all(coroutines: list[Any]) -> list[Any]:
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# Files.


def _steps(folder: pathlib.Path) -> list[int]:
    """The steps on offer: Orbax writes to `<step>.orbax-checkpoint-tmp` and renames it at the end.

    Raises:
      UserError: the directory may not be read.
    """
    try:
        if not folder.is_dir():
            return []
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {_reason(error)}") from error
    return [int(name) for name in names if name.isdecimal() and str(int(name)) == name]


def _sweep(folder: pathlib.Path) -> None:
    """Removes what unfinished saves and deletions have left, as far as it can."""
    if _is_first_process():
        for pattern in (f"*{ocp.path.step.TMP_DIR_SUFFIX}*", f"*{_DELETED}"):
            for path in folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
    """Has the disk hold a step before older ones are deleted; a late disk error shows here too."""
    for file in (*path.rglob("*"), path, path.parent):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not file.is_dir():  # not every file system can flush directories
                raise
        finally:
            os.close(descriptor)


def _is_first_process() -> bool:
    return jax.process_index() == 0


# Arrays and JSON.


def _to_host(state: PyTree) -> PyTree:
    """A copy of the state as NumPy arrays.

    A copy even on CPU, where NumPy could look into the device's own buffer: a train step that is
    given this buffer to reuse would have to leave it alone and take a new one.
    """
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return jax.tree.map(lambda leaf: np.array(leaf, order="C"), state)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, like `opt_state/0/mu/encoder/kernel`.

    The paths of a NamedTuple are those of the dictionary that Orbax makes of it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path: a key holds a slash")
    return named


def _describe(array: np.ndarray) -> dict[str, Any]:
    """An array's dtype and shape, and a SHA-256 over both and its bytes."""
    dtype, shape = array.dtype.name, [*array.shape]
    content = hashlib.sha256(f"{dtype}{shape}".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"dtype": dtype, "shape": shape, "sha256": content.hexdigest()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """What JSON makes of a configuration: lists for tuples."""
    return json.loads(json.dumps(config))


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of a nested configuration by dotted name, as JSON text."""
    fields: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = json.dumps(value)
    return fields


def _reason(error: BaseException) -> str:
    """An error in one line, without the internals that tensorstore appends in brackets."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
    return " ".join(text.split())[:500] or type(error).__name__
