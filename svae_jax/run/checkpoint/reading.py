"""Reads one step of a run and verifies it."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from svae_jax import files
from svae_jax.errors import UserError
from svae_jax.run.checkpoint import arrays, storage
from svae_jax.run.checkpoint.arrays import PyTree

FORMAT = 1


class Loaded(NamedTuple):
    """A verified checkpoint: its step, state, configuration and metrics."""

    step: int
    state: PyTree
    config: dict[str, Any]
    metrics: dict[str, float]


class DamagedError(Exception):
    """A step differs from what was saved; the message names the file or array.

    Only damage condemns a step. What may pass, such as an error of a network file system, is a
    UserError, and moves nothing.
    """


def load_step(
    folder: pathlib.Path,
    step: int,
    target: PyTree | None,
    check: Callable[[pathlib.Path, dict[str, Any]], None] = lambda path, config: None,
) -> Loaded:
    """Reads and verifies one step; checks configuration and shapes before it reads an array.

    Raises:
      UserError: the step has another configuration or other arrays, or cannot be read.
      DamagedError: the step differs from what was saved.
    """
    meta, path = read_meta(folder, step), folder / str(step)
    check(path, meta["config"])
    if target is None:
        return Loaded(step, _read_state(path, meta["arrays"]), meta["config"], meta["metrics"])
    wanted = {name: f"{leaf.dtype}{[*leaf.shape]}" for name, leaf in arrays.leaves(target).items()}
    saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in meta["arrays"].items()}
    compare(path, "model", saved, wanted)
    found = arrays.leaves(_read_state(path, meta["arrays"]))
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(target)]
    placed = jax.device_put([found[name] for name in wanted], shardings)
    state = jax.tree.unflatten(jax.tree.structure(target), placed)
    return Loaded(step, state, meta["config"], meta["metrics"])


def read_meta(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """Reads what a step's `meta` holds, verified; for the errors see `load_step`."""
    path = folder / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_bytes())
        seal = meta.pop("seal")
    except OSError as error:
        if not isinstance(error, storage.MISSING):
            raise _unreadable(path, error) from error
        raise DamagedError(f"meta/metadata: {files.reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not the bytes written
        raise DamagedError(f"meta/metadata: {files.reason(error)}") from error
    if seal != arrays.digest(meta):
        raise DamagedError("meta/metadata does not match its SHA-256")
    if meta["format"] != FORMAT:
        raise UserError(
            f"{path} has format={meta['format']}, this svae_jax reads format={FORMAT}: "
            "install the version that wrote it"
        )
    if meta["step"] != step:
        raise DamagedError(f"meta/metadata is of step {meta['step']}")
    return meta


def _read_state(path: pathlib.Path, saved: dict[str, Any]) -> PyTree:
    """Reads the arrays of a step in nested dictionaries and lists, and verifies each hash."""
    try:
        state = storage.read(path / "state")
        found = arrays.describe(state)
    except Exception as error:
        try:
            damaged = storage.damaged_file(path, error)
        except OSError as unreadable:
            raise _unreadable(path, unreadable) from error
        if damaged is None:
            raise _unreadable(path, error) from error
        raise DamagedError(f"{damaged}: {files.reason(error)}") from error
    for name in arrays.differing(saved, found):
        raise DamagedError(f"state: the array {name} does not match its SHA-256")
    return state


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    file = getattr(error, "filename", None) or path
    return UserError(
        f"cannot read {file}: {files.reason(error)}; nothing was moved or deleted: once it can be "
        "read, run the same command again"
    )


def score(folder: pathlib.Path, step: int) -> float:
    """Returns a step's `eval/elbo`, or minus infinity if it has none.

    Raises:
      UserError: the step cannot be read.
    """
    try:
        elbo = read_meta(folder, step)["metrics"]["eval/elbo"]
    except (DamagedError, KeyError):
        return -math.inf
    return elbo if math.isfinite(elbo) else -math.inf


def compare(path: pathlib.Path, what: str, saved: dict[str, str], given: dict[str, str]) -> None:
    """Raises UserError, naming up to five fields, unless both mappings are equal."""
    changed = [
        f"{name}={given.get(name, 'absent')} (saved: {saved.get(name, 'absent')})"
        for name in arrays.differing(saved, given)
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{path} is of another {what}: {', '.join(changed[:5])}{more}; "
            "set it back, or use another workdir"
        )
