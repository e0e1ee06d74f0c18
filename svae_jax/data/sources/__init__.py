"""Data sets by name: a row of `SOURCES`, or a data set of TFDS.

To add a data set, write a class with the interface `base.Source`, and add its row to `SOURCES`.
"""

from collections.abc import Callable
from pathlib import Path

from svae_jax.data.sources.base import Source
from svae_jax.data.sources.folder import Folder
from svae_jax.data.sources.tfds import TFDS, Shapes

# Called with `dataset.data_dir` and the directory of the cache.
SOURCES: dict[str, Callable[[str, Path], Source]] = {
    "shapes": Shapes,
    "folder": Folder,
}


def open_source(name: str, data_dir: str, cache_dir: Path) -> Source:
    """Opens a data set by its name.

    Raises:
        UserError: it does not exist, cannot be read or cannot be downloaded.
    """
    if name in SOURCES:
        return SOURCES[name](data_dir, cache_dir)
    return TFDS(name, data_dir, cache_dir)
