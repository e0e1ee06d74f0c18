"""Saves and restores the steps of a run, verifies each, and decides which to keep."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from svae_jax import files
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.run.checkpoint import arrays, reading, storage
from svae_jax.run.checkpoint.arrays import PyTree

Directory = str | os.PathLike[str]


class NoneIntactError(UserError):
    """There is no intact checkpoint; what is there is damaged."""


class Checkpointer(contextlib.AbstractContextManager):
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
            "format": reading.FORMAT,
            "step": step,
            "config": json.loads(json.dumps(config)),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "versions": runtime.versions(),
        }
        self._pending = self._worker.submit(self._write, step, arrays.to_host(state), meta)

    def _write(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Hashes and writes one step, and deletes old ones, in the background."""
        path = self._directory / str(step)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            storage.sweep(self._directory)
            meta["arrays"] = arrays.describe(state)
            meta["seal"] = arrays.digest(meta)
            storage.save(path, state, meta, _Retention(self._directory, self._keep))
            _note_newest(self._directory, str(step))
        except Exception as error:
            raise UserError(
                f"cannot save {path}: {files.reason(error)}; "
                f"steps still there: {storage.steps(self._directory)}; "
                "fix this and run the same command again"
            ) from error
        finally:
            storage.sweep(self._directory)  # the unfinished save may be what fills the disk

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
        config: Mapping[str, Any] | None = None,
        migrate: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    ) -> tuple[int, PyTree] | None:
        """Returns the newest intact step and its state, with the target's shardings.

        A damaged step is moved to `quarantine/` with a warning, and the one before it is tried.

        Args:
          target: arrays or `jax.ShapeDtypeStruct`s, in the structure of the saved state.
          config: the fields that must equal the saved ones, nested or by dotted names.
          migrate: brings the configuration of an older checkpoint to today's fields.

        Returns:
          None if no step was ever saved.

        Raises:
          UserError: the checkpoint has another configuration or other arrays than the target (it
            stays unchanged), it cannot be read, or all steps are damaged.
        """
        self.wait()

        def check(path: pathlib.Path, saved: dict[str, Any]) -> None:
            if config is not None:
                wanted, held = arrays.fields(config), arrays.fields(migrate(saved))
                held = {name: value for name, value in held.items() if name in wanted}
                reading.compare(path, "configuration", held, wanted)

        for step in reversed(storage.steps(self._directory)):
            try:
                return reading.load_step(self._directory, step, target, check)[:2]
            except reading.DamagedError as error:
                self._quarantine(step, error)
        # The next call must fail too, although only the quarantine is left: no silent step 0.
        if quarantined := _quarantined(self._directory):
            _note_newest(self._directory, "")
            raise NoneIntactError(
                f"no intact checkpoint in {self._directory}: all are damaged and in quarantine; to "
                f"put one back: mv {quarantined[-1]} {self._directory / quarantined[-1].name}; use "
                "another workdir, or delete the quarantine to begin again at step 0"
            )
        if are_lost(self._directory):
            raise UserError(
                f"the checkpoints of this run are lost: {self._directory} holds none, but the run "
                "has saved; put them back, or use another workdir"
            )
        return None

    def _quarantine(self, step: int, error: reading.DamagedError) -> None:
        """Moves a damaged step to `quarantine/`."""
        if not storage.is_first_process():
            return
        source, folder = self._directory / str(step), self._directory / "quarantine"
        goal, copies = folder / str(step), 1
        while goal.exists():
            copies += 1
            goal = folder / f"{step}-{copies}"
        logging.warning(
            "checkpoint %s is damaged (%s); renamed back, it is tried again: moved to %s",
            *(source, error, goal),
        )
        with files.os_errors_for_user(f"cannot move {source} to {goal}"):
            folder.mkdir(exist_ok=True)
            source.rename(goal)


class _Retention:
    """The steps that Orbax preserves: the newest `keep`, and the best by `eval/elbo`.

    An Orbax `PreservationPolicy`. Orbax asks it between writing a step and deleting others.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        self._folder, self._keep = folder, keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each step whether it stays, once the new one is on disk."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        storage.settle(self._folder / str(steps[-1]))
        try:
            best = max(steps, key=lambda step: (reading.score(self._folder, step), step))
        except UserError as error:  # the best one may be the one that cannot be read now
            logging.warning("no old checkpoint is deleted: %s", error)
            return [True] * len(steps)
        return [step == best or step in steps[-self._keep :] for step in steps]


def load(
    directory: Directory, target: PyTree | None = None, *, best: bool = False
) -> reading.Loaded:
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
        step = max(steps, key=lambda step: (reading.score(folder, step) if best else 0, step))
        tried.add(step)
        try:
            return reading.load_step(folder, step, target)
        except reading.DamagedError as error:
            if (folder / str(step)).exists():  # else the run has just deleted it
                logging.warning("checkpoint %s/%d is damaged (%s): left out", folder, step, error)
    raise (NoneIntactError if tried else UserError)(
        f"no {'intact ' if tried else ''}checkpoint in {folder}: give the `checkpoints` directory "
        "of a run that has saved"
    )


def versions(directory: Directory) -> dict[str, str]:
    """Returns the versions of the libraries that wrote the newest step, where that is known."""
    folder = pathlib.Path(directory).absolute()
    try:
        return reading.read_meta(folder, max(storage.steps(folder)))["versions"]
    except (UserError, reading.DamagedError, ValueError, KeyError):
        return {}


def are_lost(directory: Directory) -> bool:
    """Returns whether a run has saved checkpoints of which none is left.

    A run that was killed before its first checkpoint has lost nothing, nor has one whose
    checkpoints were all damaged.
    """
    folder = pathlib.Path(directory).absolute()
    with files.os_errors_for_user(f"cannot read {folder}"):
        if storage.steps(folder) or _quarantined(folder):
            return False
        try:
            return bool(_note_path(folder).read_text())
        except FileNotFoundError:  # of an older version, which saves before it writes its result
            return folder.with_name("result.json").exists()


def remove(directory: Directory) -> None:
    """Removes a directory of checkpoints, and the note that it holds some."""
    folder = pathlib.Path(directory).absolute()
    shutil.rmtree(folder)
    _note_path(folder).unlink(missing_ok=True)


def _note_newest(folder: pathlib.Path, newest: str) -> None:
    """Notes the newest step beside the directory, so that `are_lost` can tell."""
    if storage.is_first_process():
        with files.replacing(_note_path(folder)) as file:
            file.write(newest.encode())


def _note_path(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.newest")


def _quarantined(folder: pathlib.Path) -> list[pathlib.Path]:
    quarantine = folder / "quarantine"
    return sorted(quarantine.iterdir()) if quarantine.is_dir() else []
