"""A trained model as one small file, and back: what is shipped, and what colleagues are sent.

The file is an `.npz`: `about`, a JSON object, and every array of the model and of its fitted
samplers under `model/…` and `samplers/NAME/…`, without the optimizer's. Large arrays are of
float16. Unpacked, it is a workdir that every command reads; nothing in it is executed.
"""

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from svae_jax import files, samplers
from svae_jax.analysis import fitted, trained
from svae_jax.errors import UserError
from svae_jax.run import checkpoint, workdir

_FORMAT = 1
_LARGE = 2**14  # entries from which on an array is rounded; smaller ones hold scales and bases


def pack(directory: str | Path, path: str | Path) -> Path:
    """Writes a run's newest checkpoint and its fitted samplers as one file.

    Moving averages of the parameters stand for the parameters, if training kept them. Places of
    the data are left out. Samplers of another checkpoint are left out too.

    Args:
        directory: the workdir.
        path: the `.npz` file to write.

    Returns:
        The path, absolute.

    Raises:
        UserError: the directory holds no run, the file cannot be written, or a value is too large
            for float16.
    """
    source, path = files.user_path(directory, "--workdir"), files.user_path(path, "--out")
    if path.suffix != ".npz":
        raise UserError(f"--out={path}: the name must end with .npz")
    config = files.read_json(source / "config.json")
    if config is None:
        raise UserError(f"{source} is no workdir of a run: it holds no config.json")
    config["dataset"] |= {"data_dir": "", "cache_dir": ""}
    loaded = checkpoint.load(source / "checkpoints")
    whole = trained.variables_of(loaded, source)
    arrays = _flat("model", whole)
    about: dict[str, Any] = {
        "format": _FORMAT,
        "config": config,
        "data": files.read_json(source / "data.json"),
        "rows": workdir.read_metrics(source),
        "step": loaded.step,
        "metrics": loaded.metrics,
        "samplers": {},
    }
    identity = {"step": loaded.step, "fingerprint": checkpoint.fingerprint(whole)}
    for name in samplers.names():
        folder = fitted.place(source, name) / "checkpoints"
        if name != "prior" and folder.is_dir():
            fit = checkpoint.load(folder)
            if fit.config["model"] == identity and "params" in fit.state:
                about["samplers"][name] = {"step": fit.step, "config": fit.config}
                arrays |= _flat(f"samplers/{name}", fit.state["params"])
    about["dtypes"] = {name: array.dtype.name for name, array in arrays.items()}
    small = {name: _rounded(name, array) for name, array in arrays.items()}
    about["sha256"] = {name: _digest(array) for name, array in small.items()}
    with files.os_errors_for_user(f"--out={path} cannot be written"), files.replacing(path) as file:
        small["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez_compressed(file, allow_pickle=False, **small)
    return path


def unpack(path: str | Path, directory: str | Path) -> None:
    """Writes the workdir of a file of `pack`; a workdir that is there already is left as it is.

    It appears whole or not at all. Its samplers are of the rounded model.

    Args:
        path: the file.
        directory: the workdir.

    Raises:
        UserError: the file is missing, damaged or of something else; or the workdir cannot be
            written, or is of something else.
    """
    path, goal = files.user_path(path, "model"), files.user_path(directory, "--workdir")
    about, arrays = _read(path)
    with files.os_errors_for_user(f"--workdir={goal} cannot be written"):
        goal.parent.mkdir(parents=True, exist_ok=True)
        # Beside the goal, so that the rename stays within one file system.
        new = Path(tempfile.mkdtemp(dir=goal.parent, prefix=f".{goal.name}."))
        try:
            _write(new, about, arrays)
            new.chmod(0o755)
            new.rename(goal)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _write(folder: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    files.write_json(folder / "config.json", about["config"])
    if about["data"] is not None:
        files.write_json(folder / "data.json", about["data"])
    lines = "".join(f"{json.dumps(row)}\n" for row in about["rows"])
    (folder / "metrics.jsonl").write_text(lines)
    model = _tree("model", arrays)
    variables = {name: model.get(name, {}) for name in ("params", "batch_stats")}
    with checkpoint.Checkpointer(folder / "checkpoints") as checkpoints:
        config, metrics = about["config"], about["metrics"]
        checkpoints.save(about["step"], {"state": variables}, config=config, metrics=metrics)
    rounded = {"step": about["step"], "fingerprint": checkpoint.fingerprint(variables)}
    for name, fit in about["samplers"].items():
        config = {**fit["config"], "model": rounded}
        with checkpoint.Checkpointer(fitted.place(folder, name) / "checkpoints") as checkpoints:
            params = _tree(f"samplers/{name}", arrays)
            checkpoints.save(fit["step"], {"params": params}, config=config)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON object and the arrays of a file, in their original dtypes, verified."""
    damaged = UserError(f"{path} is damaged, or is no file of `python -m svae_jax.pack`")
    with files.os_errors_for_user(f"{path} cannot be read"):
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                arrays = {name: file[name] for name in about["sha256"]}
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise damaged from error
    if about["format"] != _FORMAT:
        raise UserError(f"{path} is of format {about['format']}, which this version does not know")
    if any(_digest(array) != about["sha256"][name] for name, array in arrays.items()):
        raise damaged
    return about, {name: array.astype(about["dtypes"][name]) for name, array in arrays.items()}


def _rounded(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32 or array.size < _LARGE:
        return array
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise UserError(f"{name} holds values that are too large for float16")
    return array.astype(np.float16)


def _digest(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + content.tobytes()).hexdigest()


def _flat(prefix: str, tree: PyTree) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {f"{prefix}/{name}": np.asarray(leaf) for name, leaf in flat.items()}


def _tree(prefix: str, arrays: Mapping[str, np.ndarray]) -> PyTree:
    names = [name for name in arrays if name.startswith(f"{prefix}/")]
    flat = {name.removeprefix(f"{prefix}/"): arrays[name] for name in names}
    return traverse_util.unflatten_dict(flat, sep="/")
