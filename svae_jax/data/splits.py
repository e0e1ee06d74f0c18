"""Images as one array: from TFDS, from the embedded set, or from a folder of the user's own.

Importing this module imports neither TFDS nor TensorFlow, and a split that is cached never imports
TensorFlow.
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from svae_jax.data import cache
from svae_jax.data.sources import Range, Reader, Source
from svae_jax.data.sources.folder import Folder
from svae_jax.data.sources.prepared import Prepared
from svae_jax.errors import UserError

_CHUNK = 256  # images decoded at a time
_EVERY = "every-split"  # stands in for `all`, which TFDS does not slice


def load(
    name: str,
    split: str,
    *,
    image_size: int,
    channels: int,
    data_dir: str = "",
    cache_dir: str = "",
) -> UInt8[np.ndarray, "num_images height width channels"]:
    """Decodes a split once, cropped to a square and resized; afterwards maps it into memory.

    Args:
        name: `shapes` (the embedded set), `folder` (PNG and JPEG files under `data_dir`), or any
            image data set of TFDS.
        split: In TFDS's syntax, such as `train[:45000]`; `all` is all there is. A folder has, next
            to `all`, one split for each of its subdirectories.
        image_size: Height and width of the result, in pixels.
        channels: 1 (grey) or 3 (colour), as the images have it.
        data_dir: Where TFDS keeps its data sets; empty: `TFDS_DATA_DIR`, then
            `~/tensorflow_datasets`.
        cache_dir: Where decoded splits are kept; empty: `$XDG_CACHE_HOME/svae_jax`, then
            `~/.cache/svae_jax`.

    Returns:
        Read-only `[N, image_size, image_size, channels]` in the data set's own order; a folder's is
        that of its sorted paths.

    Raises:
        UserError: anything that does not exist, cannot be had, does not fit or is damaged.
    """
    if image_size < 1:
        raise UserError(f"dataset.image_size={image_size}: at least 1 pixel is needed")
    if channels not in (1, 3):
        raise UserError(f"dataset.channels={channels}: 1 (grey) and 3 (colour) are possible")
    directory = _cache_dir(cache_dir)
    source = _open(name, data_dir, directory, channels)
    ranges = _ranges(split, source)
    path = directory / _file_name(source, ranges, image_size, channels)
    shape = (sum(stop - start for _, start, stop in ranges), image_size, image_size, channels)

    def batches() -> Iterator[np.ndarray]:
        fit = functools.partial(_fit, size=image_size, crop=source.crop, channels=channels)
        images = _decode(source.images(ranges, channels), fit)
        return _progress(images, shape[0], f"{source.title} {_text(source, ranges)}")

    return cache.open_or_build(path, shape, batches)


def _open(name: str, data_dir: str, cache_dir: Path, channels: int) -> Source:
    return Folder(data_dir) if name == "folder" else Prepared(name, data_dir, cache_dir, channels)


def _cache_dir(cache_dir: str) -> Path:
    return Path(cache_dir).expanduser() if cache_dir else cache.home()


def _ranges(split: str, source: Source) -> list[Range]:
    """What `split` asks for, as images of single splits counted from 0."""
    import tensorflow_datasets as tfds  # it knows how splits are written; without TensorFlow

    lengths = {name: sum(shards) for name, shards in source.splits.items()}
    everything = source.splits.get("all") or list(itertools.chain(*source.splits.values()))
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=shards, num_bytes=0)
        for name, shards in [*source.splits.items(), (_EVERY, everything)]
    }
    try:
        specification = re.sub(r"(?<![\w-])all(?![\w-])", _EVERY, split)
        parts = tfds.core.ReadInstruction.from_spec(specification).to_absolute(infos)
    except (ValueError, KeyError, NotImplementedError) as err:
        raise _bad_split(split, source, "") from err
    ranges: list[Range] = []
    for part in parts:
        start = part.from_ or 0
        stop = sum(infos[part.splitname].shard_lengths) if part.to is None else part.to
        if part.splitname != _EVERY:
            ranges.append((part.splitname, start, stop))
        elif "all" in lengths:
            ranges.append(("all", start, stop))
        else:
            ranges.extend(_spread(lengths, start, stop))
    ranges = [item for item in ranges if item[1] < item[2]]
    if not ranges:
        raise _bad_split(split, source, "it holds no image; ")
    return ranges


def _spread(lengths: dict[str, int], start: int, stop: int) -> Iterator[Range]:
    """Cuts a range of all splits, one after the other, into ranges of single splits."""
    offset = 0
    for name, length in lengths.items():
        yield name, max(start - offset, 0), min(stop - offset, length)
        offset += length


def _bad_split(split: str, source: Source, why: str) -> UserError:
    splits = ", ".join(f"{name} ({sum(n)} images)" for name, n in source.splits.items())
    return UserError(
        f"dataset.split or dataset.eval_split {split!r}: {why}{source.title} has {splits}; parts "
        "are written all[:90%], train[:100] or train+test"
    )


def _file_name(source: Source, ranges: list[Range], image_size: int, channels: int) -> str:
    """Readable, and different wherever the source or what is made of it differs."""
    key = {
        "layout": 1,  # to be raised when the same images would be decoded or resized differently
        "source": [source.title, source.stamps(ranges)],
        "ranges": ranges,
        "crop": source.crop,
        "size": [image_size, image_size, channels],
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    title = re.sub(r"[^\w.=-]+", "_", f"{source.title}-{_text(source, ranges)}")[-80:]
    return f"{title}-{image_size}x{image_size}x{channels}-{digest}.npy"


def _text(source: Source, ranges: list[Range]) -> str:
    return "+".join(
        name if stop - start == sum(source.splits[name]) else f"{name}[{start}:{stop}]"
        for name, start, stop in ranges
    )


def _fit(
    image: Image.Image, size: int, crop: int | None, channels: int
) -> UInt8[np.ndarray, "size size channels"]:
    """Cuts out the central square and resizes it; pixels that fit already stay as they are."""
    width, height = image.size
    side = min(width, height, crop or width)
    if width != side or height != side:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != size:  # Pillow widens the filter when it shrinks, so nothing is aliased
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(size, size, channels)


def _decode(
    images: Iterator[Reader], fit: Callable[[Image.Image], np.ndarray]
) -> Iterator[np.ndarray]:
    """Decodes on all cores, in order. Yields `[at most _CHUNK, size, size, channels]`."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(images, _CHUNK)):
            yield np.stack(list(pool.map(lambda read: fit(read()), chunk)))


def _progress(batches: Iterable[np.ndarray], count: int, what: str) -> Iterator[np.ndarray]:
    """Passes the batches on and shows how far it is: a bar on a terminal, else now and then."""
    logging.info("decoding %s: %d images, once", what, count)
    start = told = time.monotonic()
    with tqdm.tqdm(total=count, desc=f"decoding {what}", unit=" images", disable=None) as bar:
        done = 0
        for batch in batches:
            yield batch
            done += len(batch)
            bar.update(len(batch))
            now = time.monotonic()
            if bar.disable and now - told > 15:
                told = now
                left = (now - start) * (count - done) / done
                logging.info("decoding %s: %d of %d images, %.0f s left", what, done, count, left)
