"""Trained models that come with the package."""

import hashlib
import os
import shutil
from pathlib import Path

from absl import logging

from svae_jax import files
from svae_jax.analysis import exploring, packing
from svae_jax.data import cache
from svae_jax.errors import UserError

_FOLDER = Path(__file__).parents[1] / "pretrained_models"
# What is shipped, with its SHA-256: `best` and `best_vector` of configs/shapes.py after 600 steps,
# and `best` of configs/cifar10.py after 10,000; seed 0.
MODELS = {
    "shapes": "dfabf90674e5efa00f5c130d48b3d37ea497f069cc3a3047493e63caf073f72d",
    "shapes_vector": "69bd007c3a069c9d576d551f807ef7c5789c1b970bd269fc2f7e024ede9ec1c1",
    "cifar10": "db07ee07c14c5a0a2394f66901a7b4ae2aeb7288e3d698c4e3c152c982283d03",
}


def pretrained(name: str | Path) -> exploring.Run:
    """Opens a trained model that comes with the package, or a file of `python -m svae_jax.pack`.

    It is unpacked once, into the user's cache.

    Args:
        name: one of `MODELS`; or a path that ends with `.npz`.

    Returns:
        What `svae_jax.load` returns. Its `directory` is the workdir, for the commands.

    Raises:
        UserError: there is no such model, its file is damaged, or the cache cannot be written.
    """
    path = file(name)
    digest = _digest(path)
    directory = _cache() / f"{path.stem}-{digest[:16]}"
    if not directory.exists():
        _unpack(path, directory)
    try:
        return exploring.load(directory)
    except UserError as error:  # what cleans caches may have removed a part
        logging.warning("unpacking %s again: %s", path, error)
        shutil.rmtree(directory, ignore_errors=True)
        _unpack(path, directory)
        return exploring.load(directory)


def file(name: str | Path) -> Path:
    """The file of a model that comes with the package, verified, or the path itself.

    Raises:
        UserError: there is no such model, or its file is not the one that was shipped.
    """
    if name in MODELS:
        path = _FOLDER / f"{name}.npz"
        if _digest(path) != MODELS[str(name)]:
            raise UserError(
                f"{path} is damaged: it is not the file that was shipped; install it again"
            )
        return path
    if not os.fspath(name).endswith(".npz"):
        known = ", ".join(MODELS)
        raise UserError(f"there is no pretrained model {name}; choose {known}, or a .npz file")
    return files.user_path(name, "model")


def _digest(path: Path) -> str:
    with files.os_errors_for_user(f"{path} cannot be read"), path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _cache() -> Path:
    try:
        return cache.home() / "pretrained"
    except UserError:
        raise UserError(
            "a pretrained model is unpacked into the user's cache, and this user has no home: set "
            "the variable XDG_CACHE_HOME to a directory"
        ) from None


def _unpack(path: Path, directory: Path) -> None:
    try:
        packing.unpack(path, directory, "set the variable XDG_CACHE_HOME to another directory")
    except UserError:
        if not directory.exists():  # else another process was faster
            raise
