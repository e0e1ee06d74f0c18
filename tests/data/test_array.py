"""Arrays in files as a data set: mapped, never unpickled, and refused where they are damaged."""

import mmap
import zipfile

import numpy as np
import pytest
from PIL import Image

from svae_jax import data
from svae_jax.data.sources.array import Array
from svae_jax.errors import UserError

TRAIN = np.random.default_rng(0).normal(size=(10, 4, 6, 5)).astype(np.float32)
TEST = TRAIN[:3] + 1


def load(path, split="all", image_shape=(4, 6, 5), name="array"):
    return data.load(name, split, image_shape=image_shape, data_dir=str(path))


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


@pytest.fixture(params=["npy", "folder", "npz", "compressed"])
def place(request, tmp_path):
    """A file or a folder with the splits train and test; a .npy file has the first alone."""
    path = tmp_path / f"images.{request.param}"
    match request.param:
        case "npy":
            np.save(path, TRAIN)
        case "folder":
            path.mkdir()
            np.save(path / "train.npy", TRAIN)
            np.save(path / "test.npy", TEST)
        case "npz":
            np.savez(path, train=TRAIN, test=TEST)
        case "compressed":
            path = path.with_suffix(".npz")
            np.savez_compressed(path, train=TRAIN, test=TEST)
    return path


def test_arrays_are_mapped_where_they_can_be(place):
    if place.suffix == ".npy":
        np.testing.assert_array_equal(load(place), TRAIN)
        np.testing.assert_array_equal(load(place, "all[:70%]"), TRAIN[:7])
    else:
        np.testing.assert_array_equal(load(place, "train"), TRAIN)
        np.testing.assert_array_equal(load(place, "test[1:]"), TEST[1:])
        assert len(load(place, "all")) == 13
    split = "all[2:5]" if place.suffix == ".npy" else "train[2:5]"
    assert is_mapped(load(place, split)) == (place.name != "images.npz" or _is_stored(place))


def _is_stored(path):
    return all(m.compress_type == zipfile.ZIP_STORED for m in zipfile.ZipFile(path).infolist())


def test_files_are_arrays_or_pictures(tmp_path):
    np.save(tmp_path / "a.npy", TRAIN)
    fields = {"data_dir": str(tmp_path), "cache_dir": "", "height": 0, "width": 0, "channels": 0}
    found = data.resolved({"name": "files", **fields})
    assert found == {"name": "array", "height": 4, "width": 6, "channels": 5}
    (tmp_path / "a.npy").unlink()
    Image.new("L", (20, 30)).save(tmp_path / "a.png")
    found = data.resolved({"name": "files", **fields})
    assert found == {"name": "folder", "height": 30, "width": 20, "channels": 1}
    found = data.resolved({"name": "files", **fields, "height": 8, "channels": 3})
    assert found == {"name": "folder", "height": 8, "width": 20, "channels": 3}
    Image.new("RGB", (600, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"first picture, a.png: 30x600, above 512; set both"):
        data.resolved({"name": "files", **fields})


def test_images_without_channels_get_one(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 6), np.uint16))
    assert load(tmp_path / "a.npy", image_shape=(4, 6, 1)).shape == (3, 4, 6, 1)
    assert Array(str(tmp_path), tmp_path).image_shape() == (4, 6, 1)


def _truncated(path):
    np.save(path / "a.npy", TRAIN)
    content = (path / "a.npy").read_bytes()
    (path / "a.npy").write_bytes(content[:-100])


def _pickled(path):
    np.savez(path / "a.npz", train=np.array([{"no": "array"}], object))


def _pickled_and_compressed(path):
    np.savez_compressed(path / "a.npz", train=np.array([{"no": "array"}], object))


def _no_zip(path):
    (path / "a.npz").write_bytes(b"PK no")


def _of_text(path):
    (path / "a.npy").write_text("images")


def _of_two_shapes(path):
    (path / "a.npy").mkdir()
    np.save(path / "a.npy" / "train.npy", TRAIN)
    np.save(path / "a.npy" / "test.npy", TEST[:, 1:])


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (_truncated, "a.npy", r"a\.npy cannot be read \(mmap length .*save it again"),
        (_pickled, "a.npz", r"a\.npz cannot be read \(it holds pickled Python objects"),
        (_pickled_and_compressed, "a.npz", r"a\.npz cannot be read .*save it again, as numbers"),
        (_no_zip, "a.npz", r"a\.npz cannot be read \(File is not a zip file"),
        (_of_text, "a.npy", r"a\.npy cannot be read"),
        (_of_two_shapes, "a.npy", r"train is float32\[4, 6, 5\], but test is float32\[3, 6, 5\]"),
        (lambda path: None, "a.npy", r"reads a \.npy file, a \.npz file or a directory of"),
    ],
)
def test_damaged_and_wrong_files_are_refused_in_one_line(tmp_path, make, name, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith(f"dataset.data_dir={str(tmp_path / name)!r}: ")
    assert "\n" not in str(caught.value)


def test_other_sizes_than_those_of_the_array_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", TRAIN)
    with pytest.raises(UserError, match=r"dataset.width=8, but the images are \[4, 6, 5\]; set it"):
        load(tmp_path / "a.npy", image_shape=(4, 8, 5))
    with pytest.raises(UserError, match=r"'valid'.* has all \(10 images\)"):
        load(tmp_path / "a.npy", "valid")


def test_one_huge_picture_is_named_and_not_decoded(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"1 of 2 images cannot be decoded: b.png \(20000 x 20000"):
        data.load(
            "folder",
            "all",
            image_shape=(8, 8, 1),
            data_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
        )
