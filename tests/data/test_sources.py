"""A data set of the user's own: one class and one row of the table."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svae_jax import data
from svae_jax.data import sources
from svae_jax.data.sources.base import ArraySource, Source
from svae_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3)).astype(np.uint8)


class Waves:
    """Images in a NumPy file."""

    crop = None

    def __init__(self, data_dir, cache_dir):
        assert isinstance(cache_dir, Path)
        self.path = Path(data_dir) / "waves.npy"
        self.title = "waves 1.0"
        self.splits = {"train": 8, "test": 2}

    def stamps(self, ranges):
        return self.path.stat().st_size

    def images(self, ranges):
        images = np.load(self.path)
        for split, start, stop in ranges:
            for number in range(start, stop):
                index = number + (8 if split == "test" else 0)
                yield f"{split} {number}", functools.partial(Image.fromarray, images[index])


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "waves", Waves)
    np.save(tmp_path / "waves.npy", IMAGES)

    def load(split, name="waves", channels=3):
        places = {"data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
        return data.load(name, split, image_shape=(6, 6, channels), **places)

    return load


def test_an_own_data_set(load, tmp_path):
    square = IMAGES[:, :, 1:7]
    np.testing.assert_array_equal(load("train"), square[:8])
    np.testing.assert_array_equal(load("test[1:]+train[:2]"), square[[9, 0, 1]])
    np.testing.assert_array_equal(load("all[6:9]"), square[6:9])
    grey = square @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(load("all", channels=1)[..., 0], grey, atol=0.51)
    assert isinstance(Waves(tmp_path, tmp_path), Source)


def test_errors_of_an_own_data_set(load):
    with pytest.raises(UserError, match=r"waves 1\.0 has train \(8 images\), test \(2 images\)"):
        load("valid")
    with pytest.raises(UserError, match=r"dataset\.name='waive'.*did you mean waves"):
        load("train", name="waive")


def test_names_of_cached_files_stay(load, tmp_path):
    # Another name means that every cached split is decoded again: see `layout` in splits.py.
    load("train[2:5]")
    (file,) = (tmp_path / "cache").glob("*.npy")
    assert file.name == "waves_1.0-train_2_5_-6x6x3-fd89b36b4e14a07761eb.npy"


@pytest.mark.parametrize("name", sources.SOURCES)
def test_rows_of_the_table_are_sources(name, tmp_path, monkeypatch):
    from svae_jax.data.sources import shapes

    monkeypatch.setitem(shapes.SPLITS, "train", 3)
    monkeypatch.setitem(shapes.SPLITS, "test", 2)
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", IMAGES)
    source = sources.SOURCES[name](str(tmp_path), tmp_path / "cache")
    assert isinstance(source, ArraySource if name == "array" else Source)


NO_HOME = """
import os, pwd
from svae_jax import data
from svae_jax.devices.lazy_tensorflow import tensorflow

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown  # as in a container of a user without an entry
assert os.path.expanduser("~") == "~"
tensorflow().keras.backend.floatx()
data.load("cifar10", "train", image_shape=(32, 32, 3), cache_dir="cache")
"""


def test_without_a_home_no_directory_of_that_name_appears(tmp_path):
    (tmp_path / "~").mkdir()  # where Keras would write if it could
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        environment.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-c", NO_HOME],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    line = found.stderr.splitlines()[-1]
    assert "TFDS's directory is in the home, and this user has none: point dataset.data_dir" in line
    assert not list((tmp_path / "~").iterdir())
