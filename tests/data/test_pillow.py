"""Large pictures, and PNG files with long texts, which Pillow alone refuses."""

import functools
import io
import os
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from svae_jax.data import pillow
from svae_jax.data.decode import decode, to_array
from svae_jax.data.sources import tfds
from tests.data import pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
LONG = 2 * PngImagePlugin.MAX_TEXT_CHUNK


def _png(text=b"", kind=b"zTXt", after=False):
    """A PNG file of `PIXELS` with a chunk in front of its pixels, or after them."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png")
    content, chunk = file.getvalue(), pictures.chunk(kind, text)
    at = len(content) - 12 if after else 33  # in front of IEND, or behind IHDR
    return content[:at] + chunk + content[at:]


TEXTS = {
    "zTXt": b"Comment\0\0" + zlib.compress(b" " * LONG),
    "iTXt": b"Comment\0\1\0en\0Comment\0" + zlib.compress(b" " * LONG),
    "iCCP": b"profile\0\0" + zlib.compress(b" " * LONG),
    "tEXt": b"Comment\0" + b" " * (65 * 2**20),
}


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_long_text_is_left_out(kind, after):
    content = _png(TEXTS[kind], kind.encode(), after)
    with pytest.raises(ValueError, match=r"(?i)text"):  # what Pillow itself does
        Image.open(io.BytesIO(content)).load()
    pixels, _ = to_array(pillow.open_picture(content), image_shape=(8, 8, 3), crop=None)
    np.testing.assert_array_equal(pixels, PIXELS)


def test_a_short_text_is_kept():
    content = _png(b"Comment\0\0" + zlib.compress(b"hello" * 100))
    assert pillow.open_picture(content).info["Comment"] == "hello" * 100


@pytest.mark.parametrize("cut", [20, 40, 45, 60])
def test_a_png_that_is_cut_short_is_no_bug(cut):
    with pytest.raises((OSError, ValueError, SyntaxError)):
        pillow.open_picture(_png(TEXTS["zTXt"])[:cut]).load()


def _header(height, width):
    """The start of a grey PNG file of one bit a pixel, which says its size."""
    return pictures.encode(np.zeros((1, 8, 1), int), pictures.Kind("grey", 1), size=(height, width))


@pytest.fixture
def small_limits(monkeypatch):
    """Limits that small pictures reach."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    monkeypatch.setattr(pillow, "_LARGE", 30)


def _decoded(*contents, shape):
    readers = ((f"{i}.png", lambda c=c: pillow.open_picture(c)) for i, c in enumerate(contents))

    def convert(image):
        return to_array(image, image_shape=shape, crop=None)

    batches = decode(readers, convert, count=len(contents), title="", field="folder")
    return np.concatenate(list(batches))


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 4, 3)], ids=["whole", "cropped"])
def test_pictures_beyond_pillows_limit_are_read(shape):
    with pytest.raises(Image.DecompressionBombError):  # what Pillow itself does
        Image.open(io.BytesIO(_png()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _decoded(_png(), _png(), shape=shape)
    np.testing.assert_array_equal(found, [PIXELS[:, (8 - shape[1]) // 2 :][:, : shape[1]]] * 2)
    assert Image.MAX_IMAGE_PIXELS == 20


READERS = {"folder": pillow.open_picture, "TFDS": functools.partial(tfds._open_record, mode="L")}


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_two_large_pictures_are_never_in_memory_together(monkeypatch, read):
    in_memory, most, load = set(), 0, PngImagePlugin.PngImageFile.load

    def watched(image):
        nonlocal most
        in_memory.add(threading.get_ident())
        most = max(most, len(in_memory))
        time.sleep(0.01)
        return load(image)

    def convert(image):
        image.load()
        in_memory.remove(threading.get_ident())
        return PIXELS, []

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", watched)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    readers = ((f"{i}.png", functools.partial(read, _png())) for i in range(8))
    (found,) = decode(readers, convert, count=8, title="", field="folder")
    assert (len(found), most) == (8, 1)


def test_a_picture_that_would_fill_the_memory_is_refused_with_its_size():
    with pytest.raises(ValueError, match="20000 x 14000 pixels; at most 268,435,456 are read"):
        _decoded(_header(14_000, 20_000), shape=(8, 8, 3))
    assert pillow.open_picture(_header(14_000, 14_000)).size == (14_000, 14_000)
