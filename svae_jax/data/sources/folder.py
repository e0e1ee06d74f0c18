"""A directory of pictures as a data set.

The files come in one of two orders. `MIXED` is that of a hash of their paths: the same on every
machine, and any part of it holds pictures of all subdirectories, as far as chance allows. Runs of
older versions, and their caches, keep what they had: `MIXED_FEWER` has fewer files, PNG and JPEG
alone and none behind links to directories; so has `BY_PATH`, where a part may be one whole
subdirectory.
"""

import collections
import functools
import hashlib
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging
from PIL import Image, ImageOps

from svae_jax.data import pillow
from svae_jax.data.sources.base import Range, Reader
from svae_jax.errors import UserError

MIXED, MIXED_FEWER, BY_PATH = "mixed, all formats", "mixed", "by path"

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # as Pillow names them
_FEWER_SUFFIXES = (".png", ".jpg", ".jpeg")
_SUFFIXES = (
    *(*_FEWER_SUFFIXES, ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm"),
)
_KINDS_NAMED = 5  # of files that are left out
_MOST_PIXELS = 512  # along a side of an image whose size is not given


class Folder:
    """Pictures at any depth under a directory, of the formats `FORMATS`.

    Links to directories are followed, but for those that lead back to a directory above. Hidden
    files and directories are left out. The splits are `all` and one for each subdirectory.

    Raises:
        UserError: `data_dir` is not a directory, cannot be listed or holds no image.
    """

    crop: int | None = None

    def __init__(self, data_dir: str, cache_dir: Path, order: str = MIXED):
        del cache_dir  # the files are read where they are
        self.root = Path(data_dir).expanduser()
        if not data_dir or not self.root.is_dir():
            raise UserError(
                f"dataset.data_dir={data_dir!r}: not a directory; dataset.name=folder reads the "
                "pictures under the one that dataset.data_dir names"
            )
        self.title = f"folder {self.root.resolve()}"
        self._has_fewer = order != MIXED
        self._left_out: collections.Counter[str] = collections.Counter()
        ordered = sorted(self._walk(), key=None if order == BY_PATH else _hash)
        self.files: dict[str, list[str]] = {"all": ordered}
        if not self.files["all"]:
            raise UserError(
                f"dataset.data_dir={data_dir!r}: there is no picture in it, such as a file .png or "
                f".jpg{self._kinds_left_out()}"
            )
        tops = {path.partition("/")[0] for path in ordered if "/" in path} - {"all"}
        self.files |= {top: [] for top in sorted(tops)}
        for path in ordered:
            top, _, rest = path.partition("/")
            if rest and top in tops:
                self.files[top].append(path)
        self.splits = {split: len(paths) for split, paths in self.files.items()}

    def stamps(self, ranges: list[Range]) -> Any:
        """Returns path, size and modification time of each file."""
        return [self._stamp(path) for path in self.paths(ranges)]

    def images(self, ranges: list[Range]) -> Iterator[tuple[str, Reader]]:
        """Yields the path and the reader of each file; warns of what is left out."""
        if self._left_out:
            _warn_once(f"{self.title}{self._kinds_left_out()}")
        for path in self.paths(ranges):
            yield path, functools.partial(open_image, self.root / path)

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the first picture by path, for sizes that are not given.

        Raises:
            UserError: it cannot be read, or is larger than pictures of a model.
        """
        path = min(self.files["all"])
        try:
            image = ImageOps.exif_transpose(open_image(self.root / path))
        except (OSError, ValueError) as err:
            raise UserError(f"dataset.data_dir: {path} cannot be read ({err})") from err
        if max(image.size) > _MOST_PIXELS:
            raise UserError(
                f"dataset.height=0 and dataset.width=0 take the size of the first picture, {path}: "
                f"{image.height}x{image.width}, above {_MOST_PIXELS}; set both"
            )
        return image.height, image.width, 1 if image.mode in ("1", "L", "LA", "I;16") else 3

    def paths(self, ranges: list[Range]) -> list[str]:
        """Returns the files of `ranges`, in order."""
        return [path for split, start, stop in ranges for path in self.files[split][start:stop]]

    def _stamp(self, path: str) -> list[str | int]:
        try:
            stat = (self.root / path).stat()
        except OSError:  # reading it fails too, and is then reported with all other failures
            return [path]
        return [path, stat.st_size, stat.st_mtime_ns]

    def _walk(self) -> Iterator[str]:
        suffixes = _FEWER_SUFFIXES if self._has_fewer else _SUFFIXES
        above = {os.fspath(self.root): {_file_id(self.root)}}  # the directories that lead to each
        walk = os.walk(self.root, onerror=_refuse, followlinks=not self._has_fewer)
        for directory, subdirectories, names in walk:
            outer = above.pop(directory)
            inner = {name: _file_id(os.path.join(directory, name)) for name in subdirectories}
            subdirectories[:] = [
                name for name in inner if not name.startswith(".") and inner[name] not in outer
            ]
            for name in subdirectories:
                above[os.path.join(directory, name)] = outer | {inner[name]}
            for name in names:
                if name.startswith("."):
                    continue
                if name.lower().endswith(suffixes):
                    yield (Path(directory) / name).relative_to(self.root).as_posix()
                else:
                    self._left_out[os.path.splitext(name)[1].lower() or "no suffix"] += 1

    def _kinds_left_out(self) -> str:
        """How many files of which kinds are left out, for messages; empty for none."""
        kinds = [f"{count} {kind}" for kind, count in self._left_out.most_common(_KINDS_NAMED)]
        more = ["others"] if len(self._left_out) > len(kinds) else []
        return f": left out {', '.join([*kinds, *more])}" if kinds else ""


def _hash(path: str) -> tuple[bytes, str]:
    # Some systems store the letter é as two.
    normal = unicodedata.normalize("NFC", path).encode("utf-8", "surrogateescape")
    return hashlib.sha256(normal).digest(), path


def _file_id(path: str | Path) -> tuple[int, int] | None:
    """What a directory is, whichever links lead to it; None if it has gone."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


@functools.cache
def _warn_once(line: str) -> None:
    logging.warning("%s", line)


def open_image(path: Path) -> Image.Image:
    """Opens a picture, of an animation the first frame; the content decides the format."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("a device or a pipe, no file")  # reading might never end
    return pillow.open_picture(path.read_bytes(), FORMATS)


def _refuse(err: OSError) -> None:
    raise UserError(f"dataset.data_dir: {err.filename} cannot be read ({err.strerror})") from err
