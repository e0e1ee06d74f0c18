"""The directory of a run: its lock, and the JSON files `config.json` and `result.json`."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from svae_jax.errors import UserError


def create(workdir: Path) -> None:
    """Make the directory where it is missing, and see that it can be written.

    Raises:
        UserError: where it cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # two runs may begin at once
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other runs out; the operating system lets go of the lock of a killed process.

    Raises:
        UserError: at once, where another run holds it, naming that run's process and machine; and
            where the directory cannot be written.
    """
    owner = workdir / ".lock.owner"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(workdir / ".lock", timeout=0))
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except filelock.Timeout:
            by = owner.read_text() if owner.exists() else "another process"
            raise UserError(
                f"--workdir={workdir} is in use by {by}; wait for it, or choose another --workdir"
            ) from None
        except OSError as error:  # a full disk
            raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
        yield


def has_begun(workdir: Path) -> bool:
    """Whether a run has left metrics or checkpoints here, which another one must not mix with."""
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    return metrics.exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no such file.

    Raises:
        UserError: for a file that cannot be read or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); use another --workdir") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; use another --workdir")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file, atomically and durably, by the JSON of `content`.

    Raises:
        UserError: where it cannot be written; the old file, if any, is then still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
