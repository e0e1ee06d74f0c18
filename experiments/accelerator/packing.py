"""Packs images without loss, for a machine that they travel to in a small parcel.

    python -m experiments.accelerator.packing --config=cifar10 --files=2 --out=DIR

writes DIR/images-1.zip and so on, each with its share of the training and of the held-out images.
A file holds lossless WebP strips, 500 images one above another, and for each split a SHA-256 by
which `unpack` checks what it returns. WebP does not code a strip of many images as it does each of
them: tables and predictors are shared.
"""

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image

from experiments import options
from svae_jax.errors import UserError
from svae_jax.files import os_errors_for_user

Images = UInt8[np.ndarray, "n h w 3"]

_INDEX = "images.json"
_HEIGHT = 16_000  # pixels of a strip; WebP takes at most 16,383


def pack(path: Path, splits: Mapping[str, Images]) -> None:
    """Writes images by the names of their splits; all are of one height and width."""
    index = {
        name: {"shape": images.shape, "sha256": _digest(images)} for name, images in splits.items()
    }
    with os_errors_for_user(f"{path} cannot be written"), zipfile.ZipFile(path, "w") as file:
        file.writestr(_INDEX, json.dumps(index))
        with futures.ThreadPoolExecutor() as pool:
            for name, images in splits.items():
                for i, strip in enumerate(pool.map(_encode, _strips(images))):
                    file.writestr(f"{name}/{i:05d}.webp", strip)


def unpack(paths: Sequence[Path]) -> dict[str, Images]:
    """The images of several files by the names of their splits, in the order of the files.

    Raises:
        UserError: a file cannot be read, or its images are not those that were packed.
    """
    parts = [_unpack(path) for path in paths]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def image_shape(paths: Sequence[Path]) -> tuple[int, ...]:
    """Height, width and channels of the images in files, of which only the index is read.

    Raises:
        UserError: a file cannot be read, lacks the splits train and test, or files differ.
    """
    shapes = set()
    for path in paths:
        index = _index(path)
        if not {"train", "test"} <= index.keys():
            raise UserError(f"{path} holds {', '.join(index)}; train and test are needed")
        shapes |= {tuple(entry["shape"][1:]) for entry in index.values()}
    if len(shapes) != 1:
        raise UserError(f"the images are not of one shape: {sorted(shapes)}")
    return shapes.pop()


def _index(path: Path) -> dict[str, dict]:
    with _readable(path) as file:
        return json.loads(file.read(_INDEX))


def _unpack(path: Path) -> dict[str, Images]:
    index, found = _index(path), {}
    with _readable(path) as file, futures.ThreadPoolExecutor() as pool:
        for name, entry in index.items():
            members = sorted(m for m in file.namelist() if m.startswith(f"{name}/"))
            strips = list(pool.map(_decode, map(file.read, members)))
            found[name] = np.concatenate(strips).reshape(entry["shape"])
            if _digest(found[name]) != entry["sha256"]:
                raise UserError(f"{path}: the images of {name} are not those that were packed")
    return found


def _readable(path: Path) -> zipfile.ZipFile:
    try:
        file = zipfile.ZipFile(path)
        file.getinfo(_INDEX)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no file of packed images: {error}") from None
    return file


def _strips(images: Images) -> Iterator[Images]:
    count = max(1, _HEIGHT // images.shape[1])
    return (images[i : i + count] for i in range(0, len(images), count))


def _encode(images: Images) -> bytes:
    buffer = io.BytesIO()
    strip = Image.fromarray(images.reshape(-1, *images.shape[2:]))
    strip.save(buffer, "WEBP", lossless=True, exact=True, method=6, quality=75)
    return buffer.getvalue()


def _decode(content: bytes) -> Images:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _digest(images: Images) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("files", 2, "number of files", 1, flag_values=values)
    options.define_path("out", "directory for the files", values)


def main(argv: Sequence[str]) -> None:
    """Packs the images of a configuration, and prints what each file takes."""
    values = options.parse(argv, __doc__, _define, config="cifar10")
    dataset = values.config.dataset
    from svae_jax import data  # imports TFDS on use

    arrays = {
        name: data.load_of(dataset.to_dict(), None, split)
        for name, split in (("train", dataset.split), ("test", dataset.eval_split))
    }
    with os_errors_for_user(f"--out={values.out} cannot be written"):
        values.out.mkdir(parents=True, exist_ok=True)
    for i in range(values.files):
        path = values.out / f"images-{i + 1}.zip"
        parts = {
            name: images[slice(*(math.ceil(len(images) * k / values.files) for k in (i, i + 1)))]
            for name, images in arrays.items()
        }
        pack(path, parts)
        again = unpack([path])
        assert all(np.array_equal(again[name], part) for name, part in parts.items())
        counts = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
        count = sum(part.size for part in parts.values())
        size = path.stat().st_size
        print(f"{path}: {counts}; {size / 2**20:.1f} MiB, {8 * size / count:.2f} bits a value")


if __name__ == "__main__":
    options.run_command(main)
