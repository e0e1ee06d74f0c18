"""Decodes images to arrays of one size and kind, on all cores."""

import collections
import concurrent.futures
import errno
import itertools
import os
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from svae_jax import terminal
from svae_jax.data import pillow
from svae_jax.data.sources.base import Reader
from svae_jax.errors import UserError

Pixels = UInt8[np.ndarray, "height width channels"]

_CHUNK = 256  # images in memory at a time
_NAMED = 10  # failures that a message names
# Errors of the system that say nothing about the picture.
_PASSING = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN
)  # fmt: skip
# Pillow multiplies samples of 2 and 4 bits by these, but not the transparent value.
_SCALES = {"L;2": 85, "L;4": 17}


def decode(
    images: Iterator[tuple[str, Reader]],
    convert: Callable[[Image.Image], tuple[Pixels, list[str]]],
    *,
    count: int,
    title: str,
    field: str,
) -> Iterator[UInt8[np.ndarray, "batch height width channels"]]:
    """Yields the pixels of `count` images in batches, in order; logs once what was converted.

    `convert` returns an image's pixels and the conversions it took, `title` stands in the log and
    `field` (configuration fields and values) in the error.

    Raises:
        UserError: after the last image, naming those that cannot be decoded; at once, where the
            system cannot read.
    """

    def attempt(image: tuple[str, Reader]) -> tuple[Pixels, list[str]] | str:
        name, read = image
        try:
            with pillow.one_large_at_a_time():
                picture = read()
                pillow.wait_if_large(picture)  # where the reader opens it in its own way
                return convert(picture)
        except Exception as err:  # damaged bytes make a decoder raise anything
            if isinstance(err, OSError) and err.errno in _PASSING:
                raise UserError(
                    f"{field}: {name} cannot be read ({_reason(err)}); fix this and run the same "
                    "command again"
                ) from err
            return f"{name} ({_reason(err)})"

    logging.info("decoding %s: %d images, once", title, count)
    conversions: collections.Counter[str] = collections.Counter()
    named, failed = list[str](), 0
    stream = terminal.stderr()
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm.tqdm(
            total=count, desc=f"decoding {title}", unit=" images", disable=None, file=stream
        ) as bar,
    ):
        while chunk := list(itertools.islice(images, _CHUNK)):
            results = list(pool.map(attempt, chunk))
            decoded = [result for result in results if not isinstance(result, str)]
            failed += len(results) - len(decoded)
            named += [result for result in results if isinstance(result, str)]
            del named[_NAMED:]
            for _, notes in decoded:
                conversions.update(notes)
            if decoded:
                yield np.stack([pixels for pixels, _ in decoded])
            bar.update(len(chunk))
    if failed:
        more = f" and {failed - _NAMED} more" if failed > _NAMED else ""
        raise UserError(
            f"{field}: {failed} of {count} images cannot be decoded: {', '.join(named)}{more}; "
            "repair or remove them"
        )
    if conversions:
        counts = ", ".join(f"{number} {kind}" for kind, number in conversions.most_common())
        logging.warning("%s: converted %s", title, counts)


def to_array(
    image: Image.Image, *, image_shape: tuple[int, int, int], crop: int | None
) -> tuple[Pixels, list[str]]:
    """Returns an image's 8-bit pixels, upright, cropped and resized, and the conversions it took.

    16-bit samples keep their high byte. Transparent images are composited onto white. Grey is the
    luma of ITU-R 601. Colour profiles are ignored, and an animation gives its first frame.

    Args:
        image: any that Pillow opens.
        image_shape: height, width and channels of the result. What is kept is the largest centred
            part of this aspect.
        crop: side of the central square to which the image is cut before; None: it is not.

    Raises:
        ValueError: for an image that Pillow cannot convert right.
    """
    stored = _stored(image)
    ImageOps.exif_transpose(image, in_place=True)  # loads the pixels, and forgets `tile`
    is_grey = image.mode in ("1", "L", "LA") or stored.startswith(("I;16", "LA;16"))
    height, width, channels = image_shape
    steps = {
        "grey to RGB": is_grey and channels == 3,
        "colour to grey": not is_grey and channels == 1,
        "CMYK to RGB": image.mode == "CMYK",
        "from 16 to 8 bits": "16" in stored,
    }
    image = _eight_bits(image, stored)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] != 255:
            steps["transparent onto white"] = True
            ground = Image.new("RGB", image.size, "white")
            ground.paste(image, mask=alpha)
            image = ground
    image = _resized(image.convert("L" if channels == 1 else "RGB"), height, width, crop)
    pixels = np.asarray(image, np.uint8).reshape(image_shape)
    return pixels, [step for step, taken in steps.items() if taken]


def _stored(image: Image.Image) -> str:
    """The kind of samples in the file, before they are read, such as RGB;16B."""
    tiles = getattr(image, "tile", None)
    found = tiles[0][3] if tiles else ()
    # Some formats give more than the kind, such as the number of bytes a row; some do not give it.
    kinds = [kind for kind in (found if isinstance(found, tuple) else [found]) if kind]
    return kinds[0] if kinds and isinstance(kinds[0], str) else image.mode


def _eight_bits(image: Image.Image, stored: str) -> Image.Image:
    """Reduces samples to 8 bits and brings a transparent value to their scale."""
    key = image.info.get("transparency")
    if stored == "I;12":
        raise ValueError("12-bit grey; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # which Pillow clips; it keeps the high bytes of colour
        samples = np.asarray(image)
        image = Image.fromarray((samples >> 8).astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray((samples != key).astype(np.uint8) * 255))
    elif "16" in stored and key is not None:  # the low bytes that it is compared with are lost
        raise ValueError("16-bit colour with a transparent colour; save it with 8 bits")
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range that maps to 8 bits")
    elif stored in _SCALES and key is not None:
        image.info["transparency"] = key * _SCALES[stored]
    return image


def _resized(image: Image.Image, height: int, width: int, crop: int | None) -> Image.Image:
    """Cuts out the centre and resizes it; Pillow keeps pixels that fit as they are."""
    across, down = (min(side, crop or side) for side in image.size)
    if across * height > down * width:  # wider than wanted
        across = max(1, round(down * width / height))
    else:
        down = max(1, round(across * height / width))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    image = pillow.crop(image, (left, top, left + across, top + down))
    # Pillow widens the filter when it shrinks an image, so nothing is aliased.
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _reason(err: Exception) -> str:
    if isinstance(err, UnidentifiedImageError):
        return "no picture of a known format"
    text = getattr(err, "strerror", None) or str(err) or type(err).__name__
    return textwrap.shorten(text, 200, placeholder="…")
