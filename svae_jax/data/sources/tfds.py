"""Image data sets of TFDS, which is imported on use; TensorFlow only to read or write records."""

import contextlib
import difflib
import errno
import functools
import io
import itertools
import logging as std_logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from svae_jax import files
from svae_jax.data import cache, pillow
from svae_jax.data.sources.base import Range, Reader
from svae_jax.devices.lazy_tensorflow import tensorflow
from svae_jax.errors import UserError

_CROPS = {"celeb_a": 148}  # the centre that holds the face; other sets keep their shorter side
# TensorFlow's errors that may pass.
_PASSING = (
    "AbortedError", "CancelledError", "DeadlineExceededError", "InternalError",
    "PermissionDeniedError", "ResourceExhaustedError", "UnavailableError", "UnknownError",
)  # fmt: skip
_MODES = {1: "L", 2: "LA", 4: "RGBA"}  # by the number of channels; otherwise RGB


class TFDS:
    """A data set of TFDS, in the order of its files.

    Raises:
        UserError: there is no such data set, it has no images, or it cannot be prepared.
    """

    _cure = (
        "point dataset.data_dir or TFDS_DATA_DIR at a directory that holds a prepared copy, or use "
        "the embedded data set: --config=shapes"
    )

    def __init__(self, name: str, data_dir: str, cache_dir: Path):
        self.name = name
        self.data_dir = _directory(data_dir)
        is_prepared = self._open()
        self.feature = self._image_feature()
        if not is_prepared:
            # One process prepares; the others wait and then find it.
            with cache.lock(cache_dir / self.builder.name):
                if not self._open():
                    self._prepare()
        self.title = self.builder.info.full_name
        self.crop = _CROPS.get(self.builder.name)
        self.splits = {key: sum(i.shard_lengths) for key, i in self.builder.info.splits.items()}

    def stamps(self, ranges: list[Range]) -> Any:
        """Returns number of images, bytes and the files' sizes and times of each split."""
        stamps = []
        for split in sorted({split for split, _, _ in ranges}):
            info = self.builder.info.splits[split]
            stats = [self._stat(path) for path in info.filepaths]
            stamps.append([split, info.shard_lengths, int(info.num_bytes), stats])
        return stamps

    def images(self, ranges: list[Range]) -> Iterator[tuple[str, Reader]]:
        """Yields name and reader of each image; its channels are those that TFDS declares."""
        import tensorflow_datasets as tfds

        tf = tensorflow()
        only_image = tfds.decode.PartialDecoding(
            {self.feature: True}, decoders={self.feature: tfds.decode.SkipDecoding()}
        )
        mode = _MODES.get(self.builder.info.features[self.feature].shape[-1], "RGB")
        try:
            with _quiet():
                examples = self.builder.as_dataset(
                    split="+".join(f"{split}[{start}:{stop}]" for split, start, stop in ranges),
                    decoders=only_image,
                    # One file after the other: more at a time would mix their images.
                    read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
                )
            # TensorFlow hands over batches faster than single records.
            batches = examples.map(lambda example: example[self.feature]).batch(256).prefetch(4)
            records = itertools.chain.from_iterable(batches.as_numpy_iterator())
            for number, record in enumerate(records):
                name = f"image {number} of {self.title} in {self.builder.data_dir}"
                yield name, functools.partial(_open_record, record, mode)
        except tf.errors.OpError as err:
            raise self._damaged(self._bad_file(ranges), err) from err

    def _open(self) -> bool:
        """Opens the builder; returns whether its files are there."""
        import tensorflow_datasets as tfds

        from svae_jax.data.sources import SOURCES  # which holds this class

        try:
            with _quiet():
                self.builder = tfds.builder(self.name, data_dir=self.data_dir)
                return self.builder.is_prepared()
        except tfds.core.DatasetNotFoundError as err:
            known = [*SOURCES, *tfds.list_builders(with_community_datasets=False)]
            near = difflib.get_close_matches(self.name, known, n=3, cutoff=0.5) or SOURCES
            raise UserError(
                f"dataset.name={self.name!r}: there is no such data set in TFDS; did you mean "
                f"{' or '.join(near)}?"
            ) from err
        except Exception as err:  # a damaged or foreign directory makes TFDS raise anything
            raise UserError(
                f"dataset.name={self.name!r}: it cannot be opened in "
                f"{self.data_dir or 'the directory of TFDS'} ({_line(err)}); "
                + (
                    "correct the name, or remove or copy again what is damaged"
                    if _is_damage(err)
                    else "fix this and run the same command again"
                )
            ) from err

    def _image_feature(self) -> str:
        """Returns the name of the feature that holds the images."""
        import tensorflow_datasets as tfds

        features = self.builder.info.features
        items = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
        images = sorted(key for key in items if isinstance(items[key], tfds.features.Image))
        key = "image" if "image" in images or len(images) != 1 else images[0]
        if key in images and items[key].np_dtype == np.uint8:
            return key
        held = ", ".join(f"{key} ({items[key].np_dtype})" for key in images) or "no images"
        raise UserError(
            f"dataset.name={self.name!r}: the features of a data set must hold one uint8 image, or "
            f"one called image; these hold {held}"
        )

    def _prepare(self, has_own_bar: bool = False) -> None:
        """Downloads and prepares; TFDS renames the directory once it is complete."""
        if self.data_dir is None and not files.has_home():
            raise UserError(
                f"dataset.name={self.name!r}: TFDS's directory is in the home, and this user has "
                f"none: {self._cure}"
            )
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader

        tensorflow()
        downloader.MAX_RETRIES = 3  # with its 10, a user who is offline waits for 200 seconds
        show_bar = sys.stderr.isatty() and not has_own_bar
        (tfds.enable_progress_bar if show_bar else tfds.disable_progress_bar)()
        where = self.builder.data_dir
        logging.info("preparing %s in %s, once", self.builder.info.full_name, where)
        try:
            with _quiet():
                self.builder.download_and_prepare()
        except Exception as err:  # each data set has its own ways to fail
            raise UserError(
                f"dataset.name={self.name!r}: it is not in {where} and cannot be prepared there "
                f"({_line(err)}); {self._cure}"
            ) from err

    def _stat(self, path: Any) -> list[int]:
        try:
            if not os.path.exists(path):  # TFDS also reads from object stores
                return [path.stat().length, path.stat().mtime]
            return [os.stat(path).st_size, os.stat(path).st_mtime_ns]
        except OSError as err:
            raise self._damaged(path, err) from err

    def _bad_file(self, ranges: list[Range]) -> Any:
        """Returns the first file without its number of records; TensorFlow does not name it."""
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
        if not _is_damage(err):
            return UserError(
                f"dataset.name={self.name!r}: {path} cannot be read ({_line(err)}); fix this and "
                "run the same command again"
            )
        return UserError(
            f"dataset.name={self.name!r}: {path} is damaged or missing ({_line(err)}); copy it "
            f"again, or remove {self.builder.data_dir} so that it is prepared anew"
        )


def is_prepared(name: str, data_dir: str) -> bool:
    """Whether a directory, or TFDS's own if empty, holds a data set, intact or not."""
    import tensorflow_datasets as tfds

    try:
        with _quiet():
            return tfds.builder(name, data_dir=_directory(data_dir)).is_prepared()
    except tfds.core.DatasetNotFoundError:
        return False
    except Exception:  # opening it will say what is wrong
        return True


def _directory(data_dir: str) -> str | None:
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", "")) or None


class Shapes(TFDS):
    """The embedded data set, prepared in the directory of the cache.

    Raises:
        UserError: it cannot be prepared.
    """

    _cure = "set dataset.cache_dir to a directory that can be written, with 50 MB of room"

    def __init__(self, data_dir: str, cache_dir: Path):
        from svae_jax.data.sources.shapes import SpatialShapes  # TFDS then knows its name

        del data_dir  # nothing is ever written there
        super().__init__(SpatialShapes.name, str(cache_dir), cache_dir)

    def _prepare(self, has_own_bar: bool = True) -> None:
        # The lock is held, so no living process writes these.
        for leftover in Path(self.builder.data_dir).parent.glob(
            f"incomplete.*_{self.builder.version}*"
        ):
            shutil.rmtree(leftover, ignore_errors=True)
        super()._prepare(has_own_bar)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS's messages."""
    disabled = std_logging.root.manager.disable
    std_logging.disable(std_logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        std_logging.disable(disabled)


def _open_record(data: bytes, mode: str) -> Image.Image:
    image = pillow.open_picture(data).convert(mode)
    image.info.clear()  # TFDS ignores orientation and transparent colours
    return image


def _is_damage(err: Exception) -> bool:
    """Whether a file is missing or holds wrong bytes: no other error is cured by a new copy."""
    if isinstance(err, OSError):
        return err.errno in (None, errno.ENOENT, errno.ENOTDIR)
    if type(err).__module__.startswith("tensorflow"):
        return type(err).__name__ not in _PASSING
    return True


def _line(err: Exception) -> str:
    return textwrap.shorten(f"{type(err).__name__}: {err}", 200, placeholder="…")
