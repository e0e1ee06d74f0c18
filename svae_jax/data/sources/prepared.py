"""Data sets of TFDS: found, or downloaded and prepared; read as encoded images, in order.

TFDS and TensorFlow are imported inside functions, TensorFlow only where records are read or
written: it takes seconds.
"""

import contextlib
import difflib
import functools
import io
import itertools
import logging as std_logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from svae_jax.data import cache
from svae_jax.data.sources import Range, Reader
from svae_jax.devices.lazy_tensorflow import tensorflow
from svae_jax.errors import UserError

_CROPS = {"celeb_a": 148}  # the centre that holds the face; other sets keep their shorter side
_BATCH = 256  # records that TensorFlow hands over at a time


class Prepared:
    """A data set of TFDS or the embedded one, downloaded and prepared where it is not yet.

    Raises:
        UserError: there is none of that name, it has no images of so many channels, or it cannot be
            had.
    """

    def __init__(self, name: str, data_dir: str, cache_dir: Path, channels: int):
        self.name = name
        open_builder = functools.partial(_builder, name, data_dir, cache_dir)
        builder = open_builder()
        self.feature = _image_feature(name, builder.info.features, channels)
        if not _is_prepared(builder):
            # One process prepares, the others wait and then find it.
            with cache.lock(cache_dir / builder.name):
                builder = open_builder()
                if not _is_prepared(builder):
                    _prepare(name, builder, cache_dir)
        self.builder = builder
        self.title = builder.info.full_name
        self.crop = _CROPS.get(builder.name)
        self.splits = {key: info.shard_lengths for key, info in builder.info.splits.items()}

    def stamps(self, ranges: list[Range]) -> Any:
        """Length, size and time of change of the files of each split that is asked for."""
        stamps = []
        for split in sorted({split for split, _, _ in ranges}):
            info = self.builder.info.splits[split]
            stats = [self._stat(path) for path in info.filepaths]
            stamps.append([split, info.shard_lengths, int(info.num_bytes), stats])
        return stamps

    def _stat(self, path: Any) -> list[int]:
        try:
            if os.path.exists(path):
                local = os.stat(path)
                return [local.st_size, local.st_mtime_ns]
            remote = path.stat()  # TFDS also reads from object stores
            return [remote.length, remote.mtime]
        except OSError as err:
            raise self._damaged(path, err) from err

    def images(self, ranges: list[Range], channels: int) -> Iterator[Reader]:
        """What decodes each image, in the order of the files."""
        tf, tfds = tensorflow(), _tfds()
        instructions = [
            tfds.core.ReadInstruction(split, from_=start, to=stop, unit="abs")
            for split, start, stop in ranges
        ]
        only_image = tfds.decode.PartialDecoding(
            {self.feature: True}, decoders={self.feature: tfds.decode.SkipDecoding()}
        )
        try:
            with _quiet():
                examples = self.builder.as_dataset(
                    split=functools.reduce(lambda a, b: a + b, instructions),
                    decoders=only_image,
                    # One file after the other: more at a time would mix their images.
                    read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
                )
            encoded = examples.map(lambda example: example[self.feature])
            numbers = itertools.count()
            for batch in encoded.batch(_BATCH).prefetch(4).as_numpy_iterator():
                for record in batch:
                    where = f"image {next(numbers)} of {self.title} in {self.builder.data_dir}"
                    yield functools.partial(_open_record, record, where, channels)
        except tf.errors.OpError as err:
            raise self._damaged(self._bad_file(ranges), err) from err

    def _bad_file(self, ranges: list[Range]) -> Any:
        """The first file that does not hold what it should; TensorFlow does not say which."""
        tf = tensorflow()
        for split in sorted({split for split, _, _ in ranges}):
            info = self.builder.info.splits[split]
            for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
                with contextlib.suppress(tf.errors.OpError):
                    if sum(1 for _ in tf.data.TFRecordDataset(str(path))) == length:
                        continue
                return path
        return self.builder.data_dir

    def _damaged(self, path: Any, err: Exception) -> UserError:
        return UserError(
            f"dataset.name={self.name!r}: {path} is damaged or missing ({_line(err)}); copy it "
            f"again, or remove {self.builder.data_dir} so that it is prepared anew"
        )


def _tfds() -> Any:
    import tensorflow_datasets

    return tensorflow_datasets


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's talk, meant for those who write data sets, from the user's terminal."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    urllib3 = std_logging.getLogger("urllib3")  # tells of each attempt to reach a server
    urllib3_level = urllib3.level
    urllib3.setLevel(std_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        urllib3.setLevel(urllib3_level)


def _builder(name: str, data_dir: str, cache_dir: Path) -> Any:
    tfds = _tfds()
    where: str | None = str(cache_dir)
    if name != "shapes":
        where = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", "")) or None
    try:
        with _quiet():
            if name == "shapes":
                from svae_jax.data.sources.shapes import SpatialShapes

                return SpatialShapes(data_dir=where)
            return tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError as err:
        known = ["shapes", "folder", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or ["shapes", "folder"]
        raise UserError(
            f"dataset.name={name!r}: there is no such data set in TFDS; did you mean "
            f"{' or '.join(near)}?"
        ) from err
    except Exception as err:  # whatever a damaged or foreign directory makes TFDS raise
        raise UserError(
            f"dataset.name={name!r}: it cannot be opened in {where or 'the directory of TFDS'} "
            f"({_line(err)}); correct the name, or remove or copy again what is damaged"
        ) from err


def _is_prepared(builder: Any) -> bool:
    with _quiet():
        return builder.is_prepared()


def _image_feature(name: str, features: Any, channels: int) -> str:
    """The name of the feature that holds the images, if they have `channels`."""
    tfds = _tfds()
    items = dict(features.items()) if hasattr(features, "items") else {}
    images = [key for key, value in items.items() if isinstance(value, tfds.features.Image)]
    if not images:
        raise UserError(
            f"dataset.name={name!r}: it has no images; its features are {', '.join(sorted(items))}"
        )
    if len(images) > 1 and "image" not in images:
        raise UserError(
            f"dataset.name={name!r}: which of its images is meant is not clear: "
            + ", ".join(sorted(images))
        )
    key = "image" if "image" in images else images[0]
    if items[key].np_dtype != np.uint8:
        raise UserError(f"dataset.name={name!r}: its images are {items[key].np_dtype}, not uint8")
    held = items[key].shape[-1]
    if held not in (channels, None):
        raise UserError(
            f"dataset.channels={channels}: the images of {name} have {held}; "
            + (f"set dataset.channels={held}" if held in (1, 3) else "choose another data set")
        )
    return key


def _prepare(name: str, builder: Any, cache_dir: Path) -> None:
    """Downloads and prepares; TFDS writes beside the data set and renames it when it is whole."""
    tensorflow()
    tfds = _tfds()
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = 3  # its 10 let a user who is offline wait for 200 seconds
    embedded = name == "shapes"
    if embedded:
        for leftover in Path(builder.data_dir).parent.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
    if embedded or not sys.stderr.isatty():
        tfds.disable_progress_bar()  # the embedded set has its own
    else:
        tfds.enable_progress_bar()
    logging.info("preparing %s in %s, once", builder.info.full_name, builder.data_dir)
    try:
        with _quiet():
            builder.download_and_prepare()
    except Exception as err:  # each data set has its own ways to fail
        if embedded:
            raise UserError(
                f"dataset.cache_dir={str(cache_dir)!r}: the embedded data set cannot be prepared "
                f"there ({_line(err)}); it needs 50 MB of room in a directory that can be written"
            ) from err
        raise UserError(
            f"dataset.name={name!r}: it is not in {builder.data_dir}, and it cannot be downloaded "
            f"and prepared there ({_line(err)}); point dataset.data_dir or TFDS_DATA_DIR at a "
            "directory that holds a prepared copy, or use the embedded data set: "
            "--config=configs/shapes.py"
        ) from err


def _open_record(data: bytes, where: str, channels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")
    except Exception as err:  # a decoder that meets damaged bytes raises whatever it meets
        raise UserError(f"dataset.name: {where} cannot be decoded ({_line(err)})") from err


def _line(err: Exception) -> str:
    """An error in one short line."""
    text = " ".join(f"{type(err).__name__}: {err}".split())
    return text if len(text) < 200 else text[:200] + "…"
