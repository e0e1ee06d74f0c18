"""`image_files`: many images as one .npz or a folder of PNGs, in bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from svae_jax import image_files
from svae_jax.errors import UserError


def _pixels(channels):
    return np.random.default_rng(0).integers(0, 256, (7, 4, 5, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_holds_arr_0(tmp_path, channels):
    pixels, out = _pixels(channels), tmp_path / "new" / "a.npz"
    image_files.check_target(out, "npz")
    image_files.write(out, "npz", pixels.shape, iter([pixels[:3], pixels[3:]]))
    with np.load(out) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].shape == (7, 4, 5, 3)  # grey too: evaluators take no other
        np.testing.assert_array_equal(archive["arr_0"], np.broadcast_to(pixels, (7, 4, 5, 3)))
    assert [path.name for path in out.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(("channels", "dtype"), [(2, "uint8"), (1, "uint16"), (1, "float32")])
def test_an_npz_of_other_images_holds_them_as_they_are(tmp_path, channels, dtype):
    pixels = _pixels(channels).astype(dtype)
    image_files.write(tmp_path / "a.npz", "npz", pixels.shape, iter([pixels]), dtype)
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"].dtype == dtype
        np.testing.assert_array_equal(archive["arr_0"], pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_holds_pngs_in_order(tmp_path, channels):
    pixels, out = _pixels(channels), tmp_path / "new" / "folder"
    image_files.check_target(out, "png")
    image_files.write(out, "png", pixels.shape, iter([pixels[:3], pixels[3:]]))
    paths = sorted(out.iterdir())
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(7)]
    read = np.stack([np.asarray(Image.open(path)) for path in paths]).reshape(pixels.shape)
    np.testing.assert_array_equal(read, pixels)


BAD = {
    "format": ("a.npz", "gif", "--format='gif' must be one of npz, png"),
    "suffix": ("a.zip", "npz", "must end in .npz"),
    "file": ("there.npz", "npz", "exists"),
    "file for a folder": ("there.npz", "png", "exists"),
    "folder for a file": ("full.npz", "npz", "exists"),
    "full folder": ("full.npz", "png", "is not empty"),
    "below a file": ("there.npz/a.npz", "npz", "cannot be written"),
}


@pytest.mark.parametrize(("name", "image_format", "message"), BAD.values(), ids=BAD.keys())
def test_nothing_is_overwritten(tmp_path, name, image_format, message):
    (tmp_path / "there.npz").write_bytes(b"precious")
    (tmp_path / "full.npz").mkdir()
    (tmp_path / "full.npz" / "precious").touch()
    with pytest.raises(UserError, match=message):
        image_files.check_target(tmp_path / name, image_format)
    assert (tmp_path / "there.npz").read_bytes() == b"precious"


def test_an_interrupted_npz_is_absent(tmp_path):
    def broken():
        yield _pixels(3)
        raise KeyError

    out = tmp_path / "a.npz"
    with pytest.raises(KeyError):
        image_files.write(out, "npz", (14, 4, 5, 3), broken())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "a.npz.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"--out=.*a\.npz cannot be written: No space left"):
        image_files.write(tmp_path / "a.npz", "npz", (7, 4, 5, 3), iter([_pixels(3)]))


STREAMED = """
import resource, sys
from pathlib import Path
import numpy as np
from svae_jax import image_files
batch = np.zeros((1000, 64, 64, 3), np.uint8)
image_files.write(Path(sys.argv[1]), "npz", (1000, 64, 64, 3), iter([batch]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image_files.write(Path(sys.argv[2]), "npz", (20000, 64, 64, 3), (batch for _ in range(20)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_many_images_need_no_more_memory_than_one_batch(tmp_path):
    arguments = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    run = subprocess.run([sys.executable, "-c", STREAMED, *arguments], capture_output=True)
    assert int(run.stdout) < 5_000  # kB; the images are 246 MB
