"""Decides which steps to keep and restore, and verifies them."""

import concurrent.futures
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import logging

from svae_jax import files
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.run.checkpoint import arrays, storage
from svae_jax.run.checkpoint.arrays import PyTree

Directory = str | os.PathLike[str]
Migrate = Callable[[dict[str, Any]], dict[str, Any]]

_FORMAT = 1
_SCORE = "eval/elbo"


class Loaded(NamedTuple):
    """A verified checkpoint: its step, state, configuration and metrics."""

    step: int
    state: PyTree
    config: dict[str, Any]
    metrics: dict[str, float]


class _DamagedError(Exception):
    """A step differs from what was saved; the message names the file or array."""


class Checkpointer:
    """Saves the states of a run in the background, and restores the newest intact one.

    It keeps the newest `keep` steps and the best by the metric `eval/elbo`. Only one Checkpointer
    at a time may write to a directory. Use it as a context manager or call `close`, which raises an
    error of the last save.

    Args:
      directory: holds the steps; the first save creates it.
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
        """Returns itself."""
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """Closes; an error of the last save does not hide an exception of the block."""
        try:
            self.close()
        except UserError as error:
            if exc is None:
                raise
            logging.error("%s", error)

    def latest_step(self) -> int | None:
        """Returns the newest complete step, unverified, or None if there is none."""
        return max(storage.steps(self._directory), default=None)

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
          step: newer than every saved step.
          state: a pytree of arrays, the same in each process.
          config: the whole configuration, as JSON values.
          metrics: numbers by name; with `eval/elbo` the step can become the best.

        Raises:
          UserError: the previous save failed (this one was not begun, and a later one may be), or
            the step is not newer than all others.
          TypeError: the configuration does not fit JSON, or a metric is not a number.
        """
        self.wait()
        step, latest = int(step), self.latest_step()
        if latest is not None and step <= latest:
            raise UserError(
                f"cannot save step {step}: {self._directory / str(latest)} is there already; "
                "continue from it, or use another workdir"
            )
        meta = {
            "format": _FORMAT,
            "step": step,
            "config": arrays.as_json(config),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "versions": runtime.versions(),
        }
        self._pending = self._worker.submit(self._write, step, arrays.to_host(state), meta)

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
          UserError: the save failed; the message lists the steps that are still there.
        """
        if self._pending is not None:
            concurrent.futures.wait([self._pending])  # an interrupt here forgets nothing
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits until nothing is being written, and ends the background thread.

        Raises:
          UserError: the save failed; the message lists the steps that are still there.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def restore(
        self,
        target: PyTree,
        *,
        config: dict[str, Any] | None = None,
        defaults: dict[str, Any] | None = None,
        migrate: Migrate = dict,
    ) -> tuple[int, PyTree] | None:
        """Returns the newest intact step and its state, with the target's shardings.

        A damaged step is moved to `quarantine/` with a warning, and the one before it is tried.

        Args:
          target: arrays or `jax.ShapeDtypeStruct`s, in the structure of the saved state.
          config: the fields that must equal the saved ones, nested or by dotted names.
          defaults: values of fields that an older checkpoint lacks, nested or by dotted names.
          migrate: brings the fields of an older checkpoint's configuration under today's names.

        Returns:
          None if no step was ever saved.

        Raises:
          UserError: the checkpoint has another configuration or other arrays than the target (it
            stays unchanged), it cannot be read, or all steps are damaged.
        """
        self.wait()
        for step in sorted(storage.steps(self._directory), reverse=True):
            try:
                return _load_step(self._directory, step, target, config, defaults, migrate)[:2]
            except _DamagedError as error:
                self._quarantine(step, error)
        quarantine = self._directory / "quarantine"
        # The next call must fail too, although only the quarantine is left: no silent step 0.
        if quarantine.is_dir() and any(quarantine.iterdir()):
            raise UserError(
                f"no intact checkpoint in {self._directory}: all are damaged and in {quarantine}; "
                "use another workdir, or delete the quarantine to begin again at step 0"
            )
        return None

    def _quarantine(self, step: int, error: _DamagedError) -> None:
        """Moves a damaged step to `quarantine/`."""
        if not storage.is_first_process():
            return
        source, folder = self._directory / str(step), self._directory / "quarantine"
        goal, copies = folder / str(step), 1
        while goal.exists():
            copies += 1
            goal = folder / f"{step}-{copies}"
        logging.warning("checkpoint %s is damaged (%s): moved to %s", source, error, goal)
        with files.os_errors_for_user(f"cannot move {source} to {goal}"):
            folder.mkdir(exist_ok=True)
            source.rename(goal)

    def _write(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Hashes and writes one step and deletes old ones, in the background."""
        path = self._directory / str(step)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            storage.sweep(self._directory)
            meta["arrays"] = {
                name: arrays.describe(leaf) for name, leaf in arrays.leaves(state).items()
            }
            storage.save(path, state, meta | {"seal": arrays.digest(meta)})
            if storage.is_first_process():
                storage.flush(path)
                self._delete_old()
        except Exception as error:
            storage.sweep(self._directory)  # the unfinished save may be what fills the disk
            raise UserError(
                f"cannot save {path}: {files.reason(error)}; "
                f"steps still there: {sorted(storage.steps(self._directory))}; "
                "mend that and run the same command again"
            ) from error

    def _delete_old(self) -> None:
        steps = sorted(storage.steps(self._directory))
        best = max(steps, key=lambda step: (_score(self._directory, step), step))
        storage.delete(self._directory, set(steps[: -self._keep]) - {best})


def load(directory: Directory, target: PyTree | None = None, *, best: bool = False) -> Loaded:
    """Reads the newest (or best) intact step; changes nothing, and may run beside a writing run.

    Args:
      directory: holds the steps.
      target: arrays or `jax.ShapeDtypeStruct`s, in the structure of the saved state; None returns
        NumPy arrays in nested dictionaries and lists.
      best: take the step with the highest `eval/elbo`, or the newest if none has one.

    Raises:
      UserError: there is no intact step, it cannot be read, or it does not fit the target.
    """
    folder = pathlib.Path(directory).absolute()
    tried: set[int] = set()
    while steps := set(storage.steps(folder)) - tried:
        step = max(steps, key=lambda step: (_score(folder, step) if best else 0, step))
        tried.add(step)
        try:
            return _load_step(folder, step, target)
        except _DamagedError as error:
            if (folder / str(step)).exists():  # else the run has just deleted it
                logging.warning("checkpoint %s/%d is damaged (%s): left out", folder, step, error)
    raise UserError(
        f"no {'intact ' if tried else ''}checkpoint in {folder}: give the `checkpoints` directory "
        "of a run that has saved"
    )


# Reading and verifying one step.


def _load_step(
    folder: pathlib.Path,
    step: int,
    target: PyTree | None,
    config: dict[str, Any] | None = None,
    defaults: dict[str, Any] | None = None,
    migrate: Migrate = dict,
) -> Loaded:
    """Reads and verifies one step; checks configuration and shapes before it reads an array.

    Raises:
      UserError: the step has another configuration or other arrays, or cannot be read.
      _DamagedError: the step differs from what was saved.
    """
    meta, path = _read_meta(folder, step), folder / str(step)
    if config is not None:
        given = arrays.as_json(config)
        wanted, held = arrays.fields(given), arrays.fields(migrate(meta["config"]))
        held = arrays.fields(arrays.as_json(defaults or {})) | held
        held = {name: value for name, value in held.items() if name in wanted}
        _compare(path, "configuration", held, wanted)
    if target is not None:
        wanted = {
            name: f"{leaf.dtype}{[*leaf.shape]}" for name, leaf in arrays.leaves(target).items()
        }
        saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in meta["arrays"].items()}
        _compare(path, "model", saved, wanted)
    state = _read_state(path, meta["arrays"])
    if target is not None:
        found = arrays.leaves(state)
        ordered = [found[name] for name in arrays.leaves(target)]
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
        raise UserError(f"cannot read {path}: {files.reason(error)}") from error
    except Exception as error:  # any error means that the bytes differ from those written
        raise _DamagedError(f"meta/metadata: {files.reason(error)}") from error
    if seal != arrays.digest(meta):
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
    """Reads the arrays of a step in nested dictionaries and lists, and verifies each hash."""
    try:
        state = storage.read(path / "state")
        found = {name: arrays.describe(leaf) for name, leaf in arrays.leaves(state).items()}
    except MemoryError:
        raise
    except Exception as error:
        for file in path.rglob("*"):
            if file.exists() and not os.access(file, os.R_OK):
                raise UserError(f"cannot read {file}: permission denied") from error
        text = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        raise _DamagedError(
            f"state{'/_METADATA' if text else ''}: {files.reason(error)}"
        ) from error
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise _DamagedError(f"state: the array {name} does not match its SHA-256")
    return state


def _score(folder: pathlib.Path, step: int) -> float:
    """Returns a step's `eval/elbo`, or minus infinity if it has none."""
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
