"""Folders of pictures as a data set: what is read, in which order, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from svae_jax import data
from svae_jax.errors import UserError

RNG = np.random.default_rng(0)


def noise(height, width, *channels):
    return RNG.integers(0, 256, (height, width, *channels)).astype(np.uint8)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def load(root, tmp_path):
    def load(split="all", image_size=8, channels=3):
        return data.load(
            "folder",
            split,
            image_size=image_size,
            channels=channels,
            data_dir=str(root),
            cache_dir=str(tmp_path / "cache"),
        )

    return load


@pytest.fixture
def refused(load, tmp_path):
    """Checks that an image is refused, by its name, and that nothing is left in the cache."""

    def refused(match, name="odd.png", **options):
        with pytest.raises(UserError, match=match) as error:
            load(**options)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        left = [file for file in (tmp_path / "cache").glob("*") if file.suffix != ".lock"]
        assert not left

    return refused


def test_files_are_found_at_any_depth_in_the_order_of_their_paths(root, load):
    b = save(noise(8, 8, 3), root / "dogs" / "deep" / "1.PNG")
    a = save(noise(8, 8, 3), root / "cats" / "2.png")
    c = save(noise(8, 8, 3), root / "top.png")
    save(noise(8, 8, 3), root / ".hidden" / "0.png")
    save(noise(8, 8, 3), root / "cats" / "._2.png")
    (root / "notes.txt").write_text("no image")
    # Pixels that fit already stay as they are.
    np.testing.assert_array_equal(load(), [a, b, c])
    np.testing.assert_array_equal(load("cats"), [a])
    np.testing.assert_array_equal(load("dogs+cats"), [b, a])
    np.testing.assert_array_equal(load("all[:67%]"), [a, b])
    np.testing.assert_array_equal(load("all[-1:]"), [c])
    assert not load().flags.writeable


def test_jpeg(root, load):
    ramp = np.linspace(0, 255, 8, dtype=np.uint8)
    smooth = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128), -1).astype(np.uint8)
    save(smooth, root / "a.jpg", quality=100, subsampling=0)
    save(smooth, root / "b.JPEG", quality=100, subsampling=0)
    images = load()
    assert len(images) == 2
    assert abs(images[0].astype(int) - smooth).max() <= 4


def cubic(x):
    x = abs(x)
    return np.where(
        x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
    )


def resize_matrix(old, new):
    """Bicubic weights [new, old], widened when it shrinks so that nothing is aliased."""
    scale = max(old / new, 1)
    centres = (np.arange(new) + 0.5) * old / new
    weights = cubic((np.arange(old) + 0.5 - centres[:, None]) / scale)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(40, 24), (24, 41), (33, 33), (5, 7), (8, 12)])
def test_centre_crop_and_antialiased_resize(root, load, size):
    image = save(noise(*size, 3), root / "a.png")
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    square = image[top : top + side, left : left + side].astype(float)
    matrix = resize_matrix(side, 8)
    rows = np.einsum("jw,hwc->hjc", matrix, square).clip(0, 255)
    expected = np.einsum("ih,hjc->ijc", matrix, rows).clip(0, 255)
    np.testing.assert_allclose(load()[0], expected, atol=2)


def test_grey(root, load, refused):
    grey = save(noise(8, 8), root / "odd.png")
    np.testing.assert_array_equal(load(channels=1), [grey[..., None]])


def test_grey_and_colour_are_not_mixed(root, refused):
    save(noise(8, 8), root / "odd.png")
    refused(r"dataset\.channels=3: .*odd\.png has 1; set dataset\.channels=1")
    save(noise(8, 8, 3), root / "odd.png")
    refused(r"dataset\.channels=1: .*odd\.png has 3; set dataset\.channels=3", channels=1)


def test_palette_and_opaque_alpha_are_colour(root, load):
    colours = noise(8, 8, 3) // 64 * 64
    root.mkdir()
    Image.fromarray(colours).quantize(256).save(root / "a.png")
    opaque = np.concatenate([colours, np.full((8, 8, 1), 255, np.uint8)], -1)
    save(opaque, root / "b.png")
    np.testing.assert_array_equal(load(), [colours, colours])


def test_transparent_pixels_are_refused(root, refused):
    rgba = noise(8, 8, 4)
    save(rgba, root / "odd.png")
    refused("transparent pixels")


def test_transparent_colour_of_a_palette_is_refused(root, refused):
    root.mkdir()
    Image.fromarray(noise(8, 8, 3)).quantize(4).save(root / "odd.png", transparency=0)
    refused("transparent pixels")


def test_sixteen_bits_are_refused(root, refused):
    save(noise(8, 8).astype(np.uint16) * 257, root / "odd.png")
    refused("more than 8 bits", channels=1)


def test_sixteen_bits_of_colour_are_refused(root, refused):
    import struct
    import zlib

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(48))) * 8)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    root.mkdir()
    (root / "odd.png").write_bytes(png)
    refused("more than 8 bits")


def test_photographs_are_turned_upright(root, load):
    image = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown turned clockwise
    save(image, root / "a.png", exif=exif)
    np.testing.assert_array_equal(load()[0], np.rot90(image, -1))


def test_no_damaged_png_goes_unnoticed(root, load):
    image = save(noise(8, 8, 3), root / "odd.png")
    good = (root / "odd.png").read_bytes()
    refusals = 0
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (root / "odd.png").write_bytes(bad)
        try:
            np.testing.assert_array_equal(load()[0], image)
        except UserError as error:
            assert "odd.png" in str(error)  # noqa: PT017
            refusals += 1
    assert refusals > 0.9 * len(good)


@pytest.mark.parametrize("keep", [0, 10, 300, -100])
@pytest.mark.parametrize("name", ["odd.png", "odd.jpg"])
def test_files_cut_short_are_refused(root, refused, name, keep):
    save(noise(8, 8, 3), root / "good.png")
    save(noise(40, 40, 3), root / name)
    (root / name).write_bytes((root / name).read_bytes()[:keep])
    refused("cannot be decoded", name=name)


@pytest.mark.parametrize("kind", ["text", "gif"])
def test_other_files_of_that_name_are_refused(root, refused, kind):
    root.mkdir()
    if kind == "text":
        (root / "odd.png").write_text("no image at all")
    else:
        Image.fromarray(noise(8, 8)).save(root / "odd.png", format="gif")
    refused("cannot be decoded")


def test_files_that_are_gone_are_named(root, refused):
    root.mkdir()
    (root / "odd.png").symlink_to(root / "nowhere.png")
    refused("cannot be read")


def test_changed_files_are_read_again(root, load):
    save(noise(8, 8, 3), root / "a.png")
    load()
    second = save(noise(8, 8, 3), root / "a.png")
    np.testing.assert_array_equal(load(), [second])


def test_the_array_is_cached(root, load, monkeypatch):
    image = save(noise(8, 8, 3), root / "a.png")
    load()
    monkeypatch.setattr(Image, "open", None)
    np.testing.assert_array_equal(load(), [image])


@pytest.mark.parametrize("data_dir", ["", "nowhere", "file"])
def test_no_directory(tmp_path, data_dir):
    (tmp_path / "file").touch()
    place = data_dir and str(tmp_path / data_dir)
    with pytest.raises(UserError, match=r"dataset\.data_dir=.*not a directory"):
        data.load("folder", "all", image_size=8, channels=3, data_dir=place)


def test_no_images(root, load):
    root.mkdir()
    with pytest.raises(UserError, match=r"dataset\.data_dir=.*no PNG or JPEG"):
        load()


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ("birds", r"dataset\.split.*'birds'.* has all \(2 images\), cats \(1 images\)"),
        ("all[", r"'all\['"),
        ("", "''"),
        ("all[1:1]", "it holds no image"),
        ("all[2:1]", "it holds no image"),
        ("all[:3]", r"'all\[:3\]'"),
    ],
)
def test_bad_splits(root, load, split, match):
    save(noise(8, 8, 3), root / "cats" / "a.png")
    save(noise(8, 8, 3), root / "b.png")
    with pytest.raises(UserError, match=match):
        load(split)
