"""What arrays of images hold: shape, dtype, range and digest, measured in one pass.

The digest of images is the same wherever they come from: a data set of TFDS, a folder, or an array.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Num

from svae_jax import files
from svae_jax.data import cache
from svae_jax.errors import UserError
from svae_jax.pixels import DTYPES, PixelRange

Pixels = Num[np.ndarray, "_n height width channels"]

_CHUNK_BYTES = 2**22  # hashed at a time
_RELEASED = 64  # chunks after which mapped pages are dropped
_SPOT_CHECKS = 8  # chunks of a known file that are hashed again at each start
_NARROW = 0.25  # share of the range below which a warning says so


class Description(NamedTuple):
    """What an array of images holds.

    Attributes:
        num_images: N.
        shape: height, width and channels.
        dtype: of the values.
        digest: a SHA-256 of dtype, shape and values, in hexadecimal digits.
        low: the smallest value.
        high: the largest value.
    """

    num_images: int
    shape: tuple[int, ...]
    dtype: str
    digest: str
    low: float
    high: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Description":
        """The inverse of `_asdict`, after JSON."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})


class _Chunk(NamedTuple):
    """One chunk of an array: its SHA-256, its finite values' range, and what is not finite."""

    digest: str
    low: float
    high: float
    num_bad: int
    first_bad: int  # index of the image within the chunk


def from_python(images: Any) -> dict[str, Pixels]:
    """Checks arrays that a user gives, and returns them by the names of their splits.

    Args:
        images: (train, test), or arrays by the names of their splits; each ``[N, H, W, C]`` or
            ``[N, H, W]`` of uint8, uint16 or floats, in memory or memory-mapped.

    Returns:
        The same arrays, ``[N, H, W, C]``; only those that are not in C order, or not in the
        machine's byte order, are copied.

    Raises:
        UserError: another form, rank or dtype, an empty array, or arrays that differ in shape or
            dtype; it names the split and says what was found.
    """
    if not isinstance(images, Mapping):
        if not isinstance(images, tuple | list) or len(images) != 2:
            raise UserError(
                "images: give (train, test), or arrays by the names of their splits, such as "
                "{'train': …, 'validation': …}"
            )
        images = dict(zip(("train", "test"), images, strict=True))
    if odd := [name for name in images if not isinstance(name, str)]:
        raise UserError(f"images: the names of splits must be text, got {odd[0]!r}")
    arrays = {name: _with_channels(name, _as_array(name, array)) for name, array in images.items()}
    if not arrays:
        raise UserError("images: there is no split")
    (first, one), *others = arrays.items()
    for name, array in others:
        if (array.shape[1:], array.dtype) != (one.shape[1:], one.dtype):
            raise UserError(
                f"images: {name} is {_kind(array)}, but {first} is {_kind(one)}; all splits must "
                "have one shape and one dtype"
            )
    return arrays


def _as_array(name: str, images: Any) -> np.ndarray:
    try:
        return np.asanyarray(images)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of different lengths, or tensors
        raise UserError(
            f"images: {name} is not an array ({files.reason(error)}); images of different shapes "
            "must be brought to one shape first, tensors converted to NumPy"
        ) from None


def _with_channels(name: str, array: np.ndarray) -> Pixels:
    if np.ma.isMaskedArray(array):
        raise UserError(f"images: {name} is a masked array; fill it with .filled(VALUE) first")
    if array.dtype.name not in DTYPES:
        cure = "convert them with .astype"
        if array.dtype == object:
            cure = "images of different shapes must be brought to one shape first"
        raise UserError(
            f"images: {name} has dtype {array.dtype}; possible are {', '.join(DTYPES)}: {cure}"
        )
    if array.ndim not in (3, 4):
        raise UserError(
            f"images: {name} has shape {list(array.shape)}; possible are [N, H, W, C] and [N, H, W]"
        )
    if not array.size:
        raise UserError(f"images: {name} is empty, of shape {list(array.shape)}")
    # Rows are gathered from memory, and devices know the machine's own byte order alone.
    array = np.require(array, array.dtype.newbyteorder("="), "C")
    return array[..., None] if array.ndim == 3 else array


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape[1:])}"


def describe(images: Pixels, name: str, cache_dir: Path) -> Description:
    """Measures an array in one pass; a mapped file is read again only after it has changed.

    What a mapped file holds is kept in `cache_dir`, by its path, size and time. A file whose
    contents are known is spot-checked: some of its chunks are hashed again.

    Args:
        images: the array.
        name: of the split, for messages.
        cache_dir: the directory of the cache.

    Raises:
        UserError: values that are not finite; it says how many, and where the first is.
    """
    key = _file_key(images)
    memory = None if key is None else cache_dir / "described" / f"{_sha256(key.encode())}.json"
    chunks = _remembered(memory, images, name) if memory is not None else None
    if chunks is None:
        chunks = []
        with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for chunk in pool.map(_measure, _parts(images)):
                chunks.append(chunk)
                if len(chunks) % _RELEASED == 0:
                    cache.release(images)  # otherwise a mapped file would fill the memory
        if memory is not None:
            _remember(memory, chunks)
    _check_finite(chunks, images, name)
    header = f"{images.dtype.name}{list(images.shape)}"
    digest = _sha256("\n".join([header, *(chunk.digest for chunk in chunks)]).encode())
    low, high = min(chunk.low for chunk in chunks), max(chunk.high for chunk in chunks)
    return Description(len(images), tuple(images.shape[1:]), images.dtype.name, digest, low, high)


def _rows_per_chunk(images: Pixels) -> int:
    return max(1, _CHUNK_BYTES // images[0].nbytes)


def _parts(images: Pixels) -> Iterator[Pixels]:
    rows = _rows_per_chunk(images)
    return (images[begin : begin + rows] for begin in range(0, len(images), rows))


def _measure(part: Pixels) -> _Chunk:
    part = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
    digest = _sha256(part.data)
    if np.issubdtype(part.dtype, np.integer):
        return _Chunk(digest, float(part.min()), float(part.max()), 0, 0)
    finite = np.isfinite(part)
    num_bad = int(part.size - np.count_nonzero(finite))
    if num_bad == 0:
        return _Chunk(digest, float(part.min()), float(part.max()), 0, 0)
    low = float(np.min(part, where=finite, initial=np.inf))
    high = float(np.max(part, where=finite, initial=-np.inf))
    first = int(np.argmin(finite.reshape(len(part), -1).all(axis=1)))
    return _Chunk(digest, low, high, num_bad, first)


def _check_finite(chunks: list[_Chunk], images: Pixels, name: str) -> None:
    if num_bad := sum(chunk.num_bad for chunk in chunks):
        index = next(i for i, chunk in enumerate(chunks) if chunk.num_bad)
        image = index * _rows_per_chunk(images) + chunks[index].first_bad
        where = [int(axis) for axis in np.argwhere(~np.isfinite(images[image]))[0]]
        raise UserError(
            f"images: {num_bad:,} values of {name} are NaN or infinite, first at "
            f"{[image, *where]}; remove or replace them"
        )


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


# What is known of mapped files.


def _file_key(images: Pixels) -> str | None:
    """A text that changes with a mapped file; None for an array in memory, or one that may be."""
    root: Any = images
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or root.mode != "r":
        return None  # what is stored in a writable mapping need not change the file's time
    with contextlib.suppress(OSError):
        path = Path(root.filename).resolve()
        stat = path.stat()
        start = images.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        layout = [root.offset + start, images.shape, images.strides, images.dtype.str]
        return json.dumps([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, layout])
    return None


def _remembered(memory: Path, images: Pixels, name: str) -> list[_Chunk] | None:
    try:
        chunks = [_Chunk(*fields) for fields in json.loads(memory.read_text())]
    except (OSError, ValueError, TypeError):
        return None
    rows = _rows_per_chunk(images)
    if len(chunks) != -(-len(images) // rows):
        return None
    # Both ends, where files are cut or appended to, and others at each start, so that no change
    # stays unseen for long.
    others = 1 + np.random.default_rng().permutation(max(len(chunks) - 2, 0))
    for i in {0, len(chunks) - 1, *others[: _SPOT_CHECKS - 2].tolist()}:
        if _measure(images[i * rows : (i + 1) * rows]) != chunks[i]:
            logging.warning("images: the file of %s changed although its time did not", name)
            return None
    return chunks


def _remember(memory: Path, chunks: list[_Chunk]) -> None:
    with contextlib.suppress(OSError):  # it only saves time
        memory.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(memory) as file:
            file.write(json.dumps(chunks).encode())


# The range of values that the model sees as [-1, 1].


def pixel_range(train: Description, value_range: str) -> PixelRange:
    """The range of a run's images, from its training split.

    Args:
        train: the training split.
        value_range: `dataset.value_range`, "LOW,HIGH"; empty for the range of the dtype for uint8,
            and else the smallest and largest value of the training split.

    Raises:
        UserError: a text that is no range, a range that the dtype does not hold, values that are
            all the same, or doubles that single precision does not tell apart.
    """
    low, high = train.low, train.high
    if low == high:
        raise UserError(f"images: all values of the training split are {low:g}: nothing to learn")
    if value_range:
        low, high = _parse_range(value_range)
    elif train.dtype == "uint8":
        low, high = 0.0, 255.0
    try:
        is_inferred = not value_range and train.dtype != "uint8"
        pixels = PixelRange(train.dtype, low, high, is_inferred)
    except ValueError as error:
        raise UserError(f"dataset.value_range={value_range!r}: {error}") from None
    limits = np.finfo(np.float32)
    if max(abs(low), abs(high)) > float(limits.max) or high - low < 4 * float(limits.tiny):
        raise UserError(
            f"images: {train.dtype} values from {low:g} to {high:g} are beyond float32; rescale "
            "them first"
        )
    if train.dtype == "float64" and max(abs(low), abs(high)) > 1e4 * (high - low):
        raise UserError(
            f"images: float64 values from {low:g} to {high:g} differ too little for float32; "
            "subtract their mean first"
        )
    if train.high - train.low < _NARROW * (high - low):
        logging.warning(
            "images: values from %g to %g fill %.0f%% of the range from %g to %g; "
            "dataset.value_range=LOW,HIGH sets it",
            *(train.low, train.high, 100 * (train.high - train.low) / (high - low), low, high),
        )
    return pixels


def _parse_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"dataset.value_range={text!r} must be LOW,HIGH, such as 0,4095, or empty"
        ) from None
    return low, high


def check_within(
    images: Pixels, found: Description, name: str, pixels: PixelRange, is_given: bool
) -> None:
    """Checks that values lie in the range.

    Values beyond a range that was inferred from the training split are mapped beyond [-1, 1], and
    counted in one line.

    Raises:
        UserError: values lie beyond a given range.
    """
    if pixels.low <= found.low and found.high <= pixels.high:
        return
    span = f"from {found.low:g} to {found.high:g}"
    if is_given:
        raise UserError(
            f"dataset.value_range={pixels.low:g},{pixels.high:g}: {name} has values {span}; "
            "widen the range, or clip the images"
        )
    beyond = sum(
        np.count_nonzero((part < pixels.low) | (part > pixels.high)) for part in _parts(images)
    )
    logging.warning(
        "images: %d values of %s (%s) lie beyond those of the training split, %g to %g",
        *(beyond, name, span, pixels.low, pixels.high),
    )
