"""The directory of a run: its lock, whether it is of a run, and what it holds so far."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svae_jax import files
from svae_jax.errors import UserError
from svae_jax.run import events, writer

# What a run writes, besides `config.json`.
_WRITTEN = (
    "data.json",
    "result.json",
    "metrics.jsonl",
    events.PATTERN,
    *writer.PICTURES,
    "checkpoints",
)
_SECTIONS = {"dataset", "latent", "model", "seed"}  # of every configuration, of any version
_NAMED = 5  # files in a message
_UNPACKED = ".unpacked"


def create(workdir: Path) -> None:
    """Creates the directory if it is missing, and checks that it can be written.

    Raises:
        UserError: it cannot.
    """
    with _cannot_be_written(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # two runs may begin at once


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the directory; the lock of a killed process is free.

    Raises:
        UserError: another run holds the lock (the message names its process and machine), or the
            directory cannot be written.
    """
    owner = workdir / ".lock.owner"
    with contextlib.ExitStack() as stack:
        with _cannot_be_written(workdir):
            free = stack.enter_context(files.lock(workdir / ".lock", wait=False))
            if free:
                owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        if not free:
            by = owner.read_text() if owner.exists() else "another process"
            raise UserError(
                f"--workdir={workdir} is in use by {by}; wait for it, or choose another --workdir"
            )
        yield


def _cannot_be_written(workdir: Path) -> contextlib.AbstractContextManager[None]:
    return files.os_errors_for_user(f"--workdir={workdir} cannot be written")


def check_own(workdir: Path) -> None:
    """Checks that what a run would replace or remove in the directory is of a run.

    Raises:
        UserError: it holds files that a run writes, and no `config.json` of a run; the message
            names them. Or it was unpacked, so that training cannot go on in it.
    """
    if (workdir / _UNPACKED).exists():
        raise UserError(
            f"--workdir={workdir} was unpacked from a file without the optimizer's arrays, so "
            "training cannot go on in it; choose another --workdir"
        )
    fields = files.read_json(workdir / "config.json")
    if fields is not None:
        if not fields.keys() >= _SECTIONS:
            raise UserError(
                f"--workdir={workdir} is not of a run: its config.json is of something else; "
                "choose another --workdir"
            )
        return
    with files.os_errors_for_user(f"--workdir={workdir} cannot be read"):
        found = sorted(path.name for pattern in _WRITTEN for path in workdir.glob(pattern))
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"--workdir={workdir} is not of a run: it holds no config.json, but "
            f"{', '.join(found[:_NAMED])}{more}, which a run would replace; choose another "
            "--workdir"
        )


def mark_unpacked(workdir: Path) -> None:
    """Marks a workdir as one whose checkpoint lacks the optimizer's arrays."""
    (workdir / _UNPACKED).touch()


def has_begun(workdir: Path) -> bool:
    """Returns whether the directory holds metrics or checkpoints of a run."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    return metrics.exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def saved(workdir: Path) -> list[str]:
    """Returns the names of the results and checkpoints in the directory."""
    return sorted(path.name for path in (*workdir.glob("*.json"), *workdir.glob("checkpoints/*")))


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl` so far: `step`, and what was logged or evaluated at it.

    Raises:
        UserError: the file cannot be read, or is damaged.
    """
    path = workdir / "metrics.jsonl"
    with files.os_errors_for_user(f"{path} cannot be read"):
        lines = path.read_bytes().splitlines() if path.exists() else []
    try:
        # The last line may be half written.
        return [json.loads(line) for line in lines if line.endswith(b"}")]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove the damaged line") from None
