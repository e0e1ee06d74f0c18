"""PNG files of every kind, written byte by byte, and their pixels by the PNG specification."""

import struct
import zlib
from typing import NamedTuple

import numpy as np

_COLOUR_TYPES = {"grey": 0, "RGB": 2, "palette": 3, "grey+alpha": 4, "RGB+alpha": 6}
_SAMPLES = {"grey": 1, "RGB": 3, "palette": 1, "grey+alpha": 2, "RGB+alpha": 4}


class Kind(NamedTuple):
    """A kind of PNG: colour type, bits a sample, and whether one colour is transparent."""

    colour: str
    bits: int
    has_key: bool = False

    @property
    def is_grey(self):
        return self.colour.startswith("grey")


KINDS = [
    *(Kind("grey", bits, key) for bits in (1, 2, 4, 8, 16) for key in (False, True)),
    *(Kind("palette", bits, key) for bits in (1, 2, 4, 8) for key in (False, True)),
    Kind("RGB", 8),
    Kind("RGB", 8, True),
    Kind("RGB", 16),
    *(Kind(colour, bits) for colour in ("grey+alpha", "RGB+alpha") for bits in (8, 16)),
]


def chunk(kind, content):
    """A chunk of a PNG file, with length and checksum."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def encode(samples, kind, palette=None, alphas=(), key=(), size=None):
    """A PNG file of `samples` [height, width, samples]; `size` is what it says of its size."""
    height, width = size or samples.shape[:2]
    shifts = np.arange(kind.bits - 1, -1, -1)
    bits = samples.astype(np.uint16).reshape(len(samples), -1, 1) >> shifts & 1
    rows = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    filtered = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # filter 0 before each row
    header = struct.pack(">IIBBBBB", width, height, kind.bits, _COLOUR_TYPES[kind.colour], 0, 0, 0)
    chunks = [chunk(b"IHDR", header)]
    if palette is not None:
        chunks.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    if len(alphas) or len(key):
        content = bytes(alphas) or struct.pack(f">{len(key)}H", *key)
        chunks.append(chunk(b"tRNS", content))
    chunks += [chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def draw(rng, kind, height=8, width=8):
    """A random file of this kind and what it shows: colours [h, w, 3] and alphas, from 0 to 255."""
    levels = 2**kind.bits
    samples = rng.integers(0, levels, (height, width, _SAMPLES[kind.colour]))
    if kind.colour == "palette":
        palette = rng.integers(0, 256, (levels, 3))
        table = rng.integers(0, 256, levels) if kind.has_key else np.full(levels, 255)
        alphas = table.astype(np.uint8).tobytes() if kind.has_key else b""
        index = samples[..., 0]
        return encode(samples, kind, palette, alphas), palette[index], table[index]
    # The high byte of 16 bits; fewer than 8 are spread over 0 to 255.
    values = samples >> 8 if kind.bits == 16 else samples * 255 // (levels - 1)
    alpha = np.full((height, width), 255)
    if kind.colour.endswith("+alpha"):
        values, alpha = values[..., :-1], values[..., -1]
    key = ()
    if kind.has_key:
        key = samples[rng.integers(height), rng.integers(width)]
        alpha = np.where((samples == key).all(-1), 0, 255)
    return encode(samples, kind, key=key), np.broadcast_to(values, (height, width, 3)), alpha


def on_white(colours, alphas):
    share = alphas[..., None] / 255
    return share * colours + (1 - share) * 255


def luma(colours):
    return (colours @ [0.299, 0.587, 0.114])[..., None]
