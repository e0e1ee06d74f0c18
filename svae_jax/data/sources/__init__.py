"""Data sets by name: a row of `SOURCES`, or a data set of TFDS.

To add a data set, write a class with the interface `base.Source` (pictures) or `base.ArraySource`,
and add its row to `SOURCES`.
"""

from collections.abc import Callable
from pathlib import Path

from svae_jax.data.sources.array import Array, is_array
from svae_jax.data.sources.base import ArraySource, Source
from svae_jax.data.sources.folder import Folder
from svae_jax.data.sources.tfds import TFDS, Shapes

# Called with `dataset.data_dir` and the directory of the cache.
SOURCES: dict[str, Callable[[str, Path], Source | ArraySource]] = {
    "shapes": Shapes,
    "folder": Folder,
    "array": Array,
}
FILES = "files"  # `array` or `folder`, whichever `dataset.data_dir` is


def row(name: str, data_dir: str) -> str:
    """The row of `SOURCES` that a name stands for, or the name itself."""
    return name if name != FILES else "array" if is_array(data_dir) else "folder"


def has_any_channels(name: str) -> bool:
    """Whether images may have other channels than 1 or 3: not the rows of pictures, nor TFDS."""
    return name in SOURCES.keys() - {"shapes", "folder"}


def open_source(name: str, data_dir: str, cache_dir: Path) -> Source | ArraySource:
    """Opens a data set by its name.

    Raises:
        UserError: it does not exist, cannot be read or cannot be downloaded.
    """
    name = row(name, data_dir)
    if name in SOURCES:
        return SOURCES[name](data_dir, cache_dir)
    return TFDS(name, data_dir, cache_dir)
