"""A data set made of the user's own PNG and JPEG files."""

import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from svae_jax.data.sources import Range, Reader
from svae_jax.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Folder:
    """PNG and JPEG files at any depth under a directory; hidden ones are left out.

    Attributes:
        title: What it is called in messages and in the cache's key.
        splits: The number of images in each split, as a list of one: `all`, and one split for each
            subdirectory.
        crop: None: nothing is cut off but what makes an image square.

    Raises:
        UserError: there is no such directory, or no image under it.
    """

    crop: int | None = None

    def __init__(self, data_dir: str):
        self.root = Path(data_dir).expanduser()
        if not data_dir or not self.root.is_dir():
            raise UserError(
                f"dataset.data_dir={data_dir!r}: not a directory; dataset.name=folder reads the "
                "PNG and JPEG files under the one that dataset.data_dir names"
            )
        self.title = f"folder {self.root.resolve()}"
        self.files: dict[str, list[str]] = {"all": sorted(self._walk())}
        if not self.files["all"]:
            raise UserError(f"dataset.data_dir={data_dir!r}: there is no PNG or JPEG file in it")
        for path in self.files["all"]:
            top, _, rest = path.partition("/")
            if rest and top != "all":
                self.files.setdefault(top, []).append(path)
        self.splits = {split: [len(paths)] for split, paths in self.files.items()}

    def stamps(self, ranges: list[Range]) -> Any:
        """Path, size and time of change of each file that is asked for."""
        try:
            stats = [(path, (self.root / path).stat()) for path in self._paths(ranges)]
        except OSError as err:
            raise _unreadable(err) from err
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def images(self, ranges: list[Range], channels: int) -> Iterator[Reader]:
        """What decodes each image, in the order of the sorted paths."""
        for path in self._paths(ranges):
            yield functools.partial(open_image, self.root / path, channels)

    def _paths(self, ranges: list[Range]) -> list[str]:
        return [path for split, start, stop in ranges for path in self.files[split][start:stop]]

    def _walk(self) -> Iterator[str]:
        for directory, subdirectories, names in os.walk(self.root, onerror=_refuse):
            subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
            for name in names:
                if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                    yield (Path(directory) / name).relative_to(self.root).as_posix()


def open_image(path: Path, channels: int) -> Image.Image:
    """Decodes a file to 8-bit grey (one channel) or RGB (three), turned upright.

    Raises:
        UserError: it cannot be read or is damaged, has another number of channels, more than 8 bits
            in each, or transparent pixels; each would mean to guess what the picture is.
    """
    try:
        data = path.read_bytes()
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=("PNG", "JPEG")))
        image.load()
    except Exception as err:  # a decoder that meets damaged bytes raises whatever it meets
        raise UserError(
            f"dataset.data_dir: {path} cannot be decoded ({' '.join(str(err).split())}); repair or "
            "remove it"
        ) from err
    sixteen_bits = data.startswith(b"\x89PNG") and data[24] == 16  # Pillow cuts them off unasked
    if sixteen_bits or image.mode not in _GREY + _COLOUR:
        raise UserError(
            f"dataset.data_dir: {path} has more than 8 bits a channel (mode {image.mode}); save it "
            "with 8"
        )
    if _transparent(image):
        raise UserError(
            f"dataset.data_dir: {path} has transparent pixels; flatten it onto a ground first"
        )
    held = 1 if image.mode in _GREY else 3
    if held != channels:
        raise UserError(
            f"dataset.channels={channels}: {path} has {held}; set dataset.channels={held}, or "
            "convert the files to one kind"
        )
    return image.convert("L" if channels == 1 else "RGB")


def _refuse(err: OSError) -> None:
    raise _unreadable(err) from err


def _unreadable(err: OSError) -> UserError:
    return UserError(f"dataset.data_dir: {err.filename} cannot be read ({err.strerror})")


def _transparent(image: Image.Image) -> bool:
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] != 255
