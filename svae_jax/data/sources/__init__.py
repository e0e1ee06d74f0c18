"""Data sets by name: a row of `SOURCES`, or a data set of TFDS.

To add a data set, write a class with the interface `base.Source` (pictures) or `base.ArraySource`,
and add its row to `SOURCES`.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from svae_jax.data.sources import tfds
from svae_jax.data.sources.array import Array, is_array
from svae_jax.data.sources.base import ArraySource, Source
from svae_jax.data.sources.folder import MIXED, Folder
from svae_jax.data.sources.tfds import TFDS, Shapes

# Called with `dataset.data_dir` and the directory of the cache.
SOURCES: dict[str, Callable[[str, Path], Source | ArraySource]] = {
    "shapes": Shapes,
    "folder": Folder,
    "array": Array,
}
FILES = "files"  # `array` or `folder`, whichever `dataset.data_dir` is


def locate(name: str, places: Sequence[str]) -> str | None:
    """The first of some places that holds a data set; nothing is prepared or downloaded.

    A set of TFDS is also searched where TFDS itself would.

    Args:
        name: of the data set.
        places: directories for `dataset.data_dir`; empty for TFDS's own.

    Returns:
        None if no place holds it. Data sets other than files and those of TFDS say themselves
        what is wrong with a place: for these the first one.
    """
    if name in (FILES, "folder", "array"):
        return next((place for place in places if os.path.exists(os.path.expanduser(place))), None)
    if name in SOURCES:
        return places[0]
    return next((place for place in (*places, "") if tfds.is_prepared(name, place)), None)


def row(name: str, data_dir: str) -> str:
    """The row of `SOURCES` that a name stands for, or the name itself."""
    return name if name != FILES else "array" if is_array(data_dir) else "folder"


def has_any_channels(name: str) -> bool:
    """Whether images may have other channels than 1 or 3: not the rows of pictures, nor TFDS."""
    return name in SOURCES.keys() - {"shapes", "folder"}


def open_source(
    name: str, data_dir: str, cache_dir: Path, order: str = MIXED
) -> Source | ArraySource:
    """Opens a data set by its name; `order` is that of a folder's pictures.

    Raises:
        UserError: it does not exist, cannot be read or cannot be downloaded.
    """
    name = row(name, data_dir)
    if name == "folder":
        return Folder(data_dir, cache_dir, order)
    if name in SOURCES:
        return SOURCES[name](data_dir, cache_dir)
    return TFDS(name, data_dir, cache_dir)
