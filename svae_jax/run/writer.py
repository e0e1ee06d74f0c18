"""Writes a run's scalars and pictures to its workdir: `metrics.jsonl`, TensorBoard and PNG files.

`truncate` takes these files back to the step that a run resumes from.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from svae_jax import files, image_files
from svae_jax.errors import UserError
from svae_jax.run import events

PICTURES = ("samples", "samples_gaussian", "reconstructions")  # subdirectories of the workdir
JSON_LINES = "metrics.jsonl"
_MOST_PENDING = 256  # writes; beyond these a slow disk slows the run, so memory is bounded


class Writer(contextlib.AbstractContextManager):
    """Writes one run's metrics and pictures, in its own thread.

    Calls return at once; every file is flushed after each write. After a failed write nothing more
    is written, and a later call or `close` raises its UserError, which names the path. Call `flush`
    before writing what must not be newer than the metrics, such as a checkpoint. Leaving the `with`
    block closes the writer and hides no exception of the block.

    Without TensorBoard no events are written, all else is.

    `metrics.jsonl` holds one strict JSON object for each `write_scalars`: `step` and the scalars,
    with null for a number that is not finite. Training and evaluation at one step are thus two
    rows; `pandas.read_json(path, lines=True).groupby("step").first()` makes them one.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, enabled: bool = True):
        """Creates the workdir if it is missing.

        Args:
          workdir: the run's directory.
          enabled: False makes every method a no-op: of many processes, one writes.

        Raises:
          UserError: the workdir cannot be created.
        """
        self._workdir = pathlib.Path(workdir)
        self._enabled = enabled
        self._events: events.EventWriter | bool | None = None  # False: there is no TensorBoard
        self._error: Exception | None = None
        self._pending: collections.deque[futures.Future[None]] = collections.deque()
        self._thread = futures.ThreadPoolExecutor(max_workers=1)
        if enabled:
            with _as_user_error(self._workdir):
                self._workdir.mkdir(parents=True, exist_ok=True)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds a row to `metrics.jsonl` and each scalar to TensorBoard; names are as `train/kl`.

        Scalars are numbers or arrays of one element. Do not donate the arrays: the thread reads
        them once they are computed.
        """
        self._submit(self._scalars, step, dict(scalars))

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w c"]]) -> None:
        """Writes `<name>/<step, six digits>.png`, and to TensorBoard; names are from `PICTURES`."""
        if unknown := set(images) - set(PICTURES):
            raise ValueError(f"images: {sorted(unknown)} are not among {PICTURES}")
        self._submit(self._images, step, dict(images))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Shows a flat configuration in TensorBoard's HParams tab; call it once, at step 0."""
        self._submit(self._event, "config", dict(config))

    def flush(self) -> None:
        """Waits until everything is written; raises UserError if a write failed."""
        self._collect(most_pending=0)

    def close(self) -> None:
        """Waits and closes the files; raises UserError if a write failed."""
        try:
            self.flush()
            if isinstance(self._events, events.EventWriter):
                with _as_user_error(self._workdir):
                    self._events.close()
        finally:
            self._thread.shutdown()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Closes."""
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()

    def _submit(self, write: Callable[..., None], *args: Any) -> None:
        if self._enabled:
            self._collect(most_pending=_MOST_PENDING)
            self._pending.append(self._thread.submit(self._run, write, *args))

    def _collect(self, most_pending: int) -> None:
        """Raises errors of finished writes; waits while more than `most_pending` are pending."""
        while self._pending and (len(self._pending) > most_pending or self._pending[0].done()):
            self._pending.popleft().result()

    # All below runs in the writer's thread.

    def _run(self, write: Callable[..., None], *args: Any) -> None:
        try:
            if self._error is None:
                write(*args)
        except Exception as error:
            self._error = error
        if self._error is not None:
            raise self._error

    def _scalars(self, step: int, scalars: dict[str, Any]) -> None:
        row = {name: np.asarray(value).item() for name, value in scalars.items()}
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        path = self._workdir / JSON_LINES
        with _as_user_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._event("scalars", step, scalars)

    def _images(self, step: int, images: dict[str, np.ndarray]) -> None:
        for name, image in images.items():
            path = self._workdir / name / f"{step:06d}.png"
            with _as_user_error(path):
                path.parent.mkdir(exist_ok=True)
                image_files.save_picture(path, image)
                png = path.read_bytes()
            self._event("picture", step, name, image.shape[:2], png)

    def _event(self, method: str, *args: Any) -> None:
        with _as_user_error(self._workdir):
            if self._events is None:
                self._events = _event_writer(self._workdir)
            if self._events:
                getattr(self._events, method)(*args)


def _event_writer(workdir: pathlib.Path) -> events.EventWriter | bool:
    """TensorBoard's writer. Where it is not installed, one line says so, and it is False."""
    try:
        return events.EventWriter(workdir)
    except ImportError as error:
        logging.warning("metrics go to %s alone, not to TensorBoard: %s", JSON_LINES, error)
        return False


def _as_user_error(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Re-raises errors of the operating system as UserError."""
    return files.os_errors_for_user(f"workdir: cannot write {path}")


def truncate(workdir: str | os.PathLike[str], step: int) -> None:
    """Removes from a workdir what a killed run wrote after `step`, so that the run can resume.

    This removes later rows of `metrics.jsonl`, TensorBoard events and PNGs, and a torn last row or
    event; those of `step` itself stay. Steps only increase within a file, so its tail is cut off in
    place, which is atomic and works on a full disk.

    Args:
      workdir: the run's directory; no `Writer` may be open on it. It may be missing.
      step: the step that the run resumes from; -1 removes everything, for a new start.

    Raises:
      UserError: a file cannot be read or changed.
    """
    workdir = pathlib.Path(workdir)
    with _as_user_error(workdir):
        for path in workdir.glob(JSON_LINES):
            _cut(path, _row_steps, step)
        for path in workdir.glob(events.PATTERN):
            try:
                _cut(path, events.steps, step)
            except ImportError as error:  # events of a machine that had TensorBoard
                logging.warning("%s may hold steps after %d: %s", path, step, error)
        for name in PICTURES:
            for path in (workdir / name).glob("*.png*"):
                number = re.fullmatch(r"(\d+)\.png(\.tmp)?", path.name)
                if number and (number[2] or int(number[1]) > step):
                    path.unlink()


def _cut(path: pathlib.Path, steps: Callable[[Any], Iterator[tuple[int, int]]], last: int) -> None:
    """Cuts a file before its first record after step `last`, or the first unreadable one."""
    end = 0
    with path.open("rb") as file:
        for step, record_end in steps(file):
            if step > last:
                break
            end = record_end
    if end == 0:
        path.unlink()
    elif end < path.stat().st_size:
        os.truncate(path, end)


def _row_steps(file: Any) -> Iterator[tuple[int, int]]:
    """Yields (step, end in bytes) of each whole line of a JSON Lines file.

    A damaged line between whole ones stays, with a warning.
    """
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return  # torn, so it is the last
        try:
            yield int(json.loads(line)["step"]), file.tell()
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: line %d is damaged", file.name, number)
