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

from svae_jax import config as configs
from svae_jax import files, samplers
from svae_jax.analysis import fitted, trained
from svae_jax.errors import UserError
from svae_jax.run import checkpoint, workdir

_FORMAT = 1
_LARGE = 2**14  # entries from which on an array is rounded; smaller ones hold scales and bases
_MOST_BYTES = 2**32  # of all arrays: a small file may hold zeros without end
_DTYPES = ("bool", "int32", "uint32", "float16", "float32")


def pack(directory: str | Path, path: str | Path) -> Path:
    """Writes a run's newest checkpoint and its fitted samplers as one file.

    Moving averages of the parameters stand for the parameters, if training kept them. Paths of the
    data, and samplers of another checkpoint, are left out.

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
        raise UserError(f"{source} is not the workdir of a run: it holds no config.json")
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


def unpack(path: str | Path, directory: str | Path, cure: str = "") -> None:
    """Writes the workdir of a file of `pack`; a workdir that is there already is left as it is.

    It appears whole or not at all. Its samplers are of the rounded model.

    Args:
        path: the file.
        directory: the workdir.
        cure: what helps where it cannot be written.

    Raises:
        UserError: the file is missing, damaged or of something else; or the workdir cannot be
            written, or is of something else.
    """
    path, goal = files.user_path(path, "model"), files.user_path(directory, "--workdir")
    about, arrays = _read(path)
    with files.os_errors_for_user(f"{goal} cannot be written", cure):
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
    config = about["config"]
    config["dataset"] |= {"data_dir": "", "cache_dir": ""}  # somebody else's
    files.write_json(folder / "config.json", config)
    if about["data"] is not None:
        files.write_json(folder / "data.json", about["data"])
    lines = "".join(f"{json.dumps(row)}\n" for row in about["rows"])
    (folder / "metrics.jsonl").write_text(lines)
    model = _tree("model", arrays)
    variables = {name: model.get(name, {}) for name in ("params", "batch_stats")}
    with checkpoint.Checkpointer(folder / "checkpoints") as checkpoints:
        metrics = about["metrics"]
        checkpoints.save(about["step"], {"state": variables}, config=config, metrics=metrics)
    rounded = {"step": about["step"], "fingerprint": checkpoint.fingerprint(variables)}
    for name, fit in about["samplers"].items():
        identity = {**fit["config"], "model": rounded}
        with checkpoint.Checkpointer(fitted.place(folder, name) / "checkpoints") as checkpoints:
            params = _tree(f"samplers/{name}", arrays)
            checkpoints.save(fit["step"], {"params": params}, config=identity)
    workdir.mark_unpacked(folder)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON object and the arrays of a file, in their original dtypes, verified."""
    try:
        _check_members(path)
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            _check_about(path, about)
            arrays = {name: file[name] for name in about["sha256"]}
        for name, array in arrays.items():
            if _digest(array) != about["sha256"][name]:
                raise ValueError(f"{name} does not match its SHA-256")
        return about, {name: array.astype(about["dtypes"][name]) for name, array in arrays.items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.reason(error)}") from error
    except Exception as error:  # zipfile, zlib, NumPy and JSON each have their own for damage
        raise UserError(
            f"{path} is damaged, or is not a file of `python -m svae_jax.pack` "
            f"({files.reason(error)})"
        ) from error


def _check_members(path: Path) -> None:
    """Raises ValueError for a file that holds, or would become, more than a model."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > _MOST_BYTES:
        raise ValueError(f"it holds more than {_MOST_BYTES:,} bytes")
    for member in members:
        if member.filename.partition("/")[0] not in ("about.npy", "model", "samplers"):
            raise ValueError(f"it holds {member.filename}")


def _check_about(path: Path, about: dict[str, Any]) -> None:
    """Checks all that decides what is written where: names, steps, dtypes, the configuration."""
    if about["format"] != _FORMAT:
        raise UserError(f"{path} is of format {about['format']}, which this version does not know")
    for name, kind in (("rows", list), ("metrics", dict), ("data", dict | None)):
        if not isinstance(about[name], kind):
            raise ValueError(f"{name} is of type {type(about[name]).__name__}")
    if unknown := set(about["samplers"]) - (set(samplers.names()) - {"prior"}):
        raise ValueError(f"samplers: {sorted(unknown)}")
    for step in (about["step"], *(fit["step"] for fit in about["samplers"].values())):
        if type(step) is not int or step < 0:
            raise ValueError(f"step {step!r}")
    if unknown := set(about["dtypes"].values()) - set(_DTYPES):
        raise ValueError(f"dtypes: {sorted(unknown)}")
    configs.from_dict(about["config"])


def _rounded(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32 or array.size < _LARGE:
        return array
    if not np.abs(array).max() <= np.finfo(np.float16).max:
        raise UserError(f"{name} holds values that are not finite, or too large for float16")
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
