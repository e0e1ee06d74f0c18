"""Opens pictures with limits of the package's own in place of Pillow's.

Pillow refuses pictures of more than 179 million pixels, and PNG files with a text or a colour
profile that grows beyond 1 MB, since a small file may hold what fills the memory. Here such texts
are left out, larger pictures are read one at a time, and a limit remains.
"""

import contextlib
import io
import threading
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin

MOST_PIXELS = 2**28  # 16,384 x 16,384, of which each copy takes 1 GiB
_LARGE = 2**26  # pixels from which on there is one picture in memory at a time

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

_unlimited_lock, _large_lock = threading.Lock(), threading.RLock()
_of_thread = threading.local()


def open_picture(content: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens the content of a file; the pixels are read on first use.

    Args:
        content: of the file.
        formats: as Pillow names them; None for all.

    Raises:
        ValueError: it has more than `MOST_PIXELS`.
        Exception: what Pillow raises for a file that it does not know, or a damaged one.
    """
    with _unlimited():
        image = Image.open(io.BytesIO(_without_long_texts(content)), formats=formats)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are read: make it "
            "smaller"
        )
    wait_if_large(image)
    return image


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Cuts out a part, of any size; the image itself where that is all of it."""
    if box == (0, 0, *image.size):
        return image
    with _unlimited():
        return image.crop(box)


@contextlib.contextmanager
def one_large_at_a_time() -> Iterator[None]:
    """A block in which a large picture is opened and used, while other threads wait with theirs."""
    with contextlib.ExitStack() as held:
        _of_thread.held = held
        try:
            yield
        finally:
            _of_thread.held = None


def wait_if_large(image: Image.Image) -> None:
    """Within `one_large_at_a_time`, waits until no other thread has a large picture in memory."""
    held = getattr(_of_thread, "held", None)
    if held is not None and image.width * image.height > _LARGE:
        held.enter_context(_large_lock)


@contextlib.contextmanager
def _unlimited() -> Iterator[None]:
    """Lifts Pillow's limit, which is one for all threads."""
    with _unlimited_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _without_long_texts(content: bytes) -> bytes:
    """A PNG file without the texts and profiles that Pillow refuses; any other content as it is."""
    if not content.startswith(_SIGNATURE):
        return content
    view = memoryview(content)  # so that nothing is copied where nothing is cut
    begin, kept, was_cut = len(_SIGNATURE), [view[: len(_SIGNATURE)]], False
    while begin < len(content):
        length = int.from_bytes(content[begin : begin + 4])
        end = begin + 12 + length  # with length, kind and checksum
        kind = content[begin + 4 : begin + 8]
        if kind in _TEXTS and _is_long(kind, content[begin + 8 : end - 4]):
            was_cut = True
        else:
            kept.append(view[begin:end])
        begin = end
    return b"".join(kept) if was_cut else content


def _is_long(kind: bytes, body: bytes) -> bool:
    most = PngImagePlugin.MAX_TEXT_CHUNK
    _, _, rest = body.partition(b"\0")  # behind the keyword
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(body) > most
    # In front of compressed data stand a method, or, in iTXt, a flag, a method and two words.
    packed = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1)) > most
    except zlib.error:
        return False
