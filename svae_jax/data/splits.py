"""Loads a split as one array; imports TFDS on use, and TensorFlow only where nothing is cached."""

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from svae_jax.data import cache, images, sources
from svae_jax.data.decode import decode, to_array
from svae_jax.data.sources.base import ArraySource, Range, Source
from svae_jax.data.sources.folder import MIXED, Folder
from svae_jax.errors import UserError
from svae_jax.files import user_path

ARRAYS = "arrays"  # the name of a data set of arrays that the user gives

SIDES = ("height", "width", "channels")

_NAMED = 10  # splits in a message
_ODD = "odd-split-"  # begins what stands for the name of a split that TFDS does not parse
_ALL = "every-split"  # stands for `all`, which TFDS does not slice


def load_array(
    arrays: Mapping[str, images.Pixels], split: str, name: str = ARRAYS
) -> images.Pixels:
    """A split of arrays from Python, by the names that `images.from_python` gives them.

    Returns:
        A view of one array; a copy where the split joins several.

    Raises:
        UserError: the split does not exist, or is empty.
    """
    if split in arrays:  # the usual case needs no TFDS
        return arrays[split]
    source = _Arrays({key: len(array) for key, array in arrays.items()}, name)
    parts = [arrays[key][start:stop] for key, start, stop in _ranges(split, source)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load(
    name: str,
    split: str,
    *,
    image_shape: tuple[int, int, int],
    data_dir: str = "",
    cache_dir: str = "",
    order: str = MIXED,
) -> images.Pixels:
    """Loads a split, cropped and resized to one shape: decoded once, afterwards mapped into memory.

    Grey and colour are converted to `channels` and 16-bit samples to their high byte; transparent
    images are composited onto white. One log line counts the converted images.

    Args:
        name: `shapes` (the embedded set), `folder` (the pictures under `data_dir`), `array`
            (.npy and .npz files), `files` (either of these), another row of
            `svae_jax.data.sources.SOURCES`, or any image data set of TFDS.
        split: In TFDS's syntax, such as `train[:45000]`; `all` joins all splits. A folder has `all`
            and one split for each of its subdirectories.
        image_shape: Height and width of the result, in pixels, and channels: 1 (grey) or 3
            (colour). Pictures of another aspect keep the largest centred part of this one.
        data_dir: Where TFDS keeps its data sets; empty: `TFDS_DATA_DIR`, then
            `~/tensorflow_datasets`.
        cache_dir: Where decoded splits are kept; empty: `$XDG_CACHE_HOME/svae_jax`, then
            `~/.cache/svae_jax`.
        order: Of a folder's pictures: `MIXED`, by a hash of their paths, or `BY_PATH`.

    Returns:
        Read-only `[N, height, width, channels]` in the data set's order. Arrays come as they are,
        in their own dtype.

    Raises:
        UserError: for arguments out of range, data sets and splits that do not exist or cannot be
            read, and images that cannot be decoded; nothing is cached then.
    """
    if name == ARRAYS:
        raise UserError(
            f"dataset.name={ARRAYS!r} are arrays from Python: give them as images=(train, test) to "
            "loop.train, svae_jax.load, fitting.fit or evaluating.evaluate"
        )
    *size, channels = image_shape
    for field, pixels in zip(("height", "width"), size, strict=True):
        if pixels < 1:
            raise UserError(f"dataset.{field}={pixels}: at least 1 pixel is needed")
    directory = cache_directory(cache_dir)
    source = sources.open_source(name, data_dir, directory, order)
    if isinstance(source, ArraySource):
        check_shape(image_shape, next(iter(source.arrays.values())).shape[1:])
        return load_array(source.arrays, split, source.title)
    if channels not in (1, 3):
        raise UserError(f"dataset.channels={channels}: 1 (grey) and 3 (colour) are possible")
    ranges = _ranges(split, source)
    count = sum(stop - start for _, start, stop in ranges)
    path = directory / _file_name(source, ranges, image_shape)

    def batches() -> Iterator[np.ndarray]:
        return decode(
            source.images(ranges),
            functools.partial(to_array, image_shape=image_shape, crop=source.crop),
            count=count,
            title=f"{source.title} {_text(source, ranges)}",
            field=f"dataset.name={name!r}, dataset.data_dir={data_dir!r}",
        )

    return cache.open_or_build(path, (count, *image_shape), batches)


def load_of(
    dataset: Mapping[str, Any],
    arrays: Mapping[str, images.Pixels] | None,
    split: str,
    order: str = MIXED,
) -> images.Pixels:
    """A split of the data set of a configuration.

    Args:
        dataset: the fields of `dataset`.
        arrays: those from Python, by the names of their splits, if the run is of arrays.
        split: in TFDS's syntax.
        order: of a folder's pictures.

    Raises:
        UserError: as `load`.
    """
    if arrays is not None:
        return load_array(arrays, split)
    shape = tuple(dataset[field] for field in SIDES)
    places = {field: dataset[field] for field in ("data_dir", "cache_dir")}
    return load(dataset["name"], split, image_shape=shape, order=order, **places)


def count_shared(
    dataset: Mapping[str, Any],
    arrays: Mapping[str, images.Pixels] | None,
    splits: tuple[str, str],
    order: str = MIXED,
) -> int:
    """The number of images that two splits of a data set share.

    Args:
        dataset: the fields of `dataset`.
        arrays: as of `load_of`.
        splits: two splits in TFDS's syntax.
        order: of a folder's pictures.

    Raises:
        UserError: as `load`.
    """
    if arrays is not None:
        return _count_same_memory(*(load_array(arrays, split) for split in splits))
    directory = cache_directory(dataset["cache_dir"])
    source = sources.open_source(dataset["name"], dataset["data_dir"], directory, order)
    if isinstance(source, ArraySource):
        return count_shared(dataset, source.arrays, splits)
    a, b = (_ranges(split, source) for split in splits)
    if isinstance(source, Folder):  # a file is in `all` and in the split of its subdirectory
        return len({*source.paths(a)} & {*source.paths(b)})
    of_a, of_b = ({(key, i) for key, *ends in ranges for i in range(*ends)} for ranges in (a, b))
    return len(of_a & of_b)


def _count_same_memory(a: images.Pixels, b: images.Pixels) -> int:
    """The number of rows that two arrays in C order have in common."""
    begins = [x.__array_interface__["data"][0] for x in (a, b)]
    ends = [begin + x.nbytes for begin, x in zip(begins, (a, b), strict=True)]
    return max(0, min(ends) - max(begins)) // a[0].nbytes


def resolved(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The name and the sizes of a configuration's images, where it leaves them to the data.

    Args:
        dataset: the fields of `dataset`.

    Returns:
        `name`, `height`, `width` and `channels`; sizes of 0 are replaced where the source of the
        images has a method `image_shape`.

    Raises:
        UserError: as `load`.
    """
    name, data_dir = sources.row(dataset["name"], dataset["data_dir"]), dataset["data_dir"]
    shape = [dataset[field] for field in SIDES]
    if 0 in shape and hasattr(sources.SOURCES.get(name), "image_shape"):
        source: Any = sources.open_source(name, data_dir, cache_directory(dataset["cache_dir"]))
        shape = [given or found for given, found in zip(shape, source.image_shape(), strict=True)]
    return {"name": name, **dict(zip(SIDES, shape, strict=True))}


def check_outside(dataset: Mapping[str, Any], directory: Path) -> None:
    """Checks that a run does not write its pictures among those that it reads.

    Args:
        dataset: the fields of `dataset`, resolved.
        directory: the workdir.

    Raises:
        UserError: the workdir lies in a part of a folder that the run's splits read; or as `load`.
    """
    root = Path(dataset["data_dir"]).expanduser().resolve()
    if dataset["name"] != "folder" or not directory.resolve().is_relative_to(root):
        return
    source = Folder(dataset["data_dir"], cache_directory(dataset["cache_dir"]))
    splits = (dataset["split"], dataset["eval_split"])
    read = {key for split in splits for key, _, _ in _ranges(split, source)}
    if read & {"all", *directory.resolve().relative_to(root).parts[:1]}:
        raise UserError(
            f"--workdir={directory} lies among the pictures of dataset.data_dir={str(root)!r}, and "
            "a run writes pictures; choose another --workdir"
        )


def check_shape(given: tuple[int, ...], found: tuple[int, ...]) -> None:
    """Checks that the sizes of a configuration are 0 or those of its arrays.

    Raises:
        UserError: naming the field that differs.
    """
    for field, size, actual in zip(SIDES, given, found, strict=True):
        if size not in (0, actual):
            raise UserError(
                f"dataset.{field}={size}, but the images are {list(found)}; set it to {actual}, or "
                "to 0, which takes it from the images"
            )


def cache_directory(cache_dir: str) -> Path:
    """Where decoded splits are kept: `dataset.cache_dir`, or the user's cache.

    Raises:
        UserError: there is no such place.
    """
    return user_path(cache_dir, "dataset.cache_dir") if cache_dir else cache.home()


class _Arrays(NamedTuple):
    """What splits of arrays are cut by."""

    splits: dict[str, int]
    title: str


def _ranges(split: str, source: Source | _Arrays) -> list[Range]:
    """Parses `split` to ranges of single splits."""
    try:
        return _parsed(split, source, {})
    except UserError:
        odd = [name for name in source.splits if not re.fullmatch(r"[\w-]+", name)]
        if not any(name in split for name in odd):
            raise
        return _parsed(split, source, {name: f"{_ODD}{i}" for i, name in enumerate(odd)})


def _parsed(split: str, source: Source | _Arrays, stand_ins: Mapping[str, str]) -> list[Range]:
    """Parses `split`, where other names stand in for those that TFDS does not parse."""
    import tensorflow_datasets as tfds  # without TensorFlow

    lengths = {"all": sum(source.splits.values())} | source.splits
    infos = {
        stand_ins.get(key, key): tfds.core.SplitInfo(
            name=stand_ins.get(key, key), shard_lengths=[length], num_bytes=0
        )
        for key, length in (lengths | {_ALL: lengths["all"]}).items()
    }
    names = {stand_in: name for name, stand_in in stand_ins.items()} | {_ALL: "all"}
    specification = re.sub(
        r"(?<![\w-])all(?![\w-])", _ALL, _with_stand_ins(split.strip(), stand_ins)
    )
    parts = []
    for text in re.split(r"\s*\+\s*", specification):
        try:
            instruction = tfds.core.ReadInstruction.from_spec(text)
            (part,) = instruction.to_absolute(infos)
        except (ValueError, KeyError, NotImplementedError) as err:
            raise _bad_split(split, source, "") from err
        if _is_share_of_nothing(instruction, part, infos[part.splitname].num_examples):
            name = names.get(part.splitname, part.splitname)
            text = text.replace(part.splitname, name, 1)
            raise _bad_split(split, source, f"{text} rounds to no image; ")
        parts.append(part)
    ranges: list[Range] = []
    for part in parts:
        key = names.get(part.splitname, part.splitname)
        start, stop = part.from_ or 0, lengths[key] if part.to is None else part.to
        ranges += [(key, start, stop)] if key in source.splits else _spread(source, start, stop)
    ranges = [item for item in ranges if item[1] < item[2]]
    if not ranges:
        raise _bad_split(split, source, "it holds no image; ")
    return ranges


def _with_stand_ins(split: str, stand_ins: Mapping[str, str]) -> str:
    """Replaces names between the signs of TFDS's syntax, the longest first."""
    if not stand_ins:
        return split
    names = "|".join(map(re.escape, sorted(stand_ins, key=len, reverse=True)))
    pattern = rf"((?:^|\+)\s*)({names})(?=\s*(?:\[|\+|$))"
    return re.sub(pattern, lambda found: found[1] + stand_ins[found[2]], split)


def _is_share_of_nothing(relative: Any, absolute: Any, length: int) -> bool:
    """Whether a share in per cent rounds to no image, where TFDS may take all: [-1%:] of 30."""
    if relative.unit != "%":
        return False
    begin, end = absolute.from_ or 0, length if absolute.to is None else absolute.to
    counts_from_end = relative.from_ is not None and math.copysign(1, relative.from_) < 0
    return begin >= end or (counts_from_end and round(relative.from_ * length / 100) == 0)


def _spread(source: Source | _Arrays, start: int, stop: int) -> Iterator[Range]:
    """Cuts a range over all splits, joined in order, into ranges of single splits."""
    offset = 0
    for split, length in source.splits.items():
        yield split, max(start - offset, 0), min(stop - offset, length)
        offset += length


def _bad_split(split: str, source: Source | _Arrays, why: str) -> UserError:
    named = itertools.islice(source.splits.items(), _NAMED)
    splits = ", ".join(f"{name} ({length} images)" for name, length in named)
    if (more := len(source.splits) - _NAMED) > 0:
        splits += f" and {more:,} more"
    return UserError(
        f"dataset.split or dataset.eval_split {split!r}: {why}{source.title} has {splits}; parts "
        "are written all[:90%], train[:100] or train+test"
    )


def _file_name(source: Source, ranges: list[Range], image_shape: tuple[int, int, int]) -> str:
    """Returns a readable name that differs wherever the files or their decoding differ."""
    key = {
        "layout": 1,  # raise it when the same files give other pixels
        "source": [source.title, source.stamps(ranges)],
        "ranges": ranges,
        "crop": source.crop,
        "size": image_shape,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    title = re.sub(r"[^\w.=-]+", "_", f"{source.title}-{_text(source, ranges)}")[-80:]
    return f"{title}-{'x'.join(map(str, image_shape))}-{digest}.npy"


def _text(source: Source, ranges: list[Range]) -> str:
    return "+".join(
        split if stop - start == source.splits[split] else f"{split}[{start}:{stop}]"
        for split, start, stop in ranges
    )
