"""Folders of images as a data set: which are read, in which order, and which are refused."""

import hashlib
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from svae_jax import data
from svae_jax.errors import UserError
from tests.data.pictures import KINDS, Kind, draw, encode, luma, on_white

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
    def load(split="all", image_shape=(8, 8, 3), order=data.BY_PATH):
        return data.load(
            "folder",
            split,
            image_shape=image_shape,
            data_dir=str(root),
            cache_dir=str(tmp_path / "cache"),
            order=order,
        )

    return load


@pytest.fixture
def refused(load, tmp_path):
    """Checks that files are refused by their names, and that nothing is left in the cache."""

    def refused(*reasons, of=None, named=None, **options):
        count = len(reasons)
        with pytest.raises(UserError, match=f": {count} of {of or count} images") as error:
            load(**options)
        message = str(error.value)
        assert message.startswith("dataset.name='folder', dataset.data_dir=")
        assert message.endswith("; repair or remove them")
        assert "\n" not in message
        for reason in reasons[:named]:
            assert reason in message
        for reason in reasons[named:] if named else ():
            assert reason not in message
        left = [file for file in (tmp_path / "cache").glob("*") if file.suffix != ".lock"]
        assert not left

    return refused


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


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


def test_a_part_of_a_mixed_folder_holds_all_classes(root, load):
    for number in range(10):
        for i in range(20):
            save(np.full((8, 8, 3), 20 * number, np.uint8), root / f"class{number}" / f"{i}.png")
    for part in ("all[:90%]", "all[90%:]"):
        classes, counts = np.unique(load(part, order=data.MIXED)[:, 0, 0, 0], return_counts=True)
        assert len(classes) > 5
        assert counts.max() < 0.4 * counts.sum()
    assert len(np.unique(load("all[90%:]")[:, 0, 0, 0])) == 1  # which an older version gave


def test_the_mixed_order_is_of_the_paths_alone(root, load, tmp_path):
    names = ["b/1.png", "a/2.png", "a/10.png", "c/é.png", "c/d/e.png"]
    levels = {name: 40 * i for i, name in enumerate(names)}
    for name in names:
        save(np.full((8, 8, 3), levels[name], np.uint8), root / name)
    first = load(order=data.MIXED)[:, 0, 0, 0].tolist()
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert first == [levels[name] for name in by_hash]
    (root / "c" / "é.png").rename(root / "c" / "e\u0301.png")  # as macOS stores it
    root.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(root)
    assert load(order=data.MIXED)[:, 0, 0, 0].tolist() == first
    of_c = load("c", order=data.MIXED)[:, 0, 0, 0].tolist()
    assert of_c == [levels[name] for name in by_hash if name.startswith("c/")]


def test_the_orders_have_caches_of_their_own(root, load):
    images = [save(noise(8, 8, 3), root / f"{i}.png") for i in range(9)]
    np.testing.assert_array_equal(load(), images)
    assert not np.array_equal(load(order=data.MIXED), images)
    np.testing.assert_array_equal(load(), images)


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


# Conversions


@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_every_kind_in_one_folder(root, load, channels, caplog):
    root.mkdir()
    rng, expected, clear = np.random.default_rng(1), [], 0
    for number, kind in enumerate(KINDS):
        file, colours, alphas = draw(rng, kind)
        (root / f"{number:02d}.png").write_bytes(file)
        shown = on_white(colours, alphas)
        expected.append(luma(shown) if channels == 1 else shown)
        clear += (alphas < 255).any()
    np.testing.assert_allclose(load(image_shape=(8, 8, channels)), expected, rtol=0, atol=1.001)
    grey = sum(kind.is_grey for kind in KINDS)
    counts = {
        "grey to RGB": grey if channels == 3 else 0,
        "colour to grey": len(KINDS) - grey if channels == 1 else 0,
        "transparent onto white": clear,
        "from 16 to 8 bits": sum(kind.bits == 16 for kind in KINDS),
    }
    (line,) = warnings(caplog)
    where, _, told = line.partition(": converted ")
    assert where == f"folder {root} all"
    assert set(told.split(", ")) == {f"{count} {step}" for step, count in counts.items() if count}
    caplog.clear()
    load(image_shape=(8, 8, channels))  # from the cache
    assert not warnings(caplog)


def test_nothing_is_said_of_files_that_fit(root, load, caplog):
    grey = save(noise(8, 8), root / "grey" / "a.png")
    colour = save(noise(8, 8, 3), root / "colour" / "b.png")
    opaque = np.concatenate([colour, np.full((8, 8, 1), 255, np.uint8)], -1)
    save(opaque, root / "colour" / "c.png")
    np.testing.assert_array_equal(load("grey", image_shape=(8, 8, 1)), [grey[..., None]])
    np.testing.assert_array_equal(load("colour"), [colour, colour])
    assert not warnings(caplog)


def test_the_content_decides_the_format(root, load):
    image = save(noise(8, 8, 3), root / "a.jpg", format="png")
    grey = np.full((8, 8, 3), 99, np.uint8)
    save(grey, root / "b.PNG", format="jpeg", quality=100)
    loaded = load()
    np.testing.assert_array_equal(loaded[0], image)
    np.testing.assert_allclose(loaded[1], grey, atol=1)


def test_photographs_are_turned_upright(root, load):
    image = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown turned clockwise
    save(image, root / "a.png", exif=exif)
    np.testing.assert_array_equal(load()[0], np.rot90(image, -1))


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("a.webp", True),
        ("a.bmp", True),
        ("a.tif", True),
        ("a.TIFF", True),
        ("a.ppm", True),
        ("a.jfif", False),
        ("a.gif", False),
    ],
)
def test_formats_that_pillow_reads(root, load, caplog, name, exact):
    ramp = np.linspace(0, 255, 8, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128), -1).astype(np.uint8)
    options = {"lossless": True} if name == "a.webp" else {}
    save(image, root / name, **options)
    np.testing.assert_allclose(load(order=data.MIXED)[0], image, atol=0 if exact else 40)
    assert not warnings(caplog)
    with pytest.raises(UserError, match=f"left out 1 {(root / name).suffix.lower()}"):
        load(order="mixed")  # as a run of an older version, which did not see them


def test_an_animation_gives_its_first_frame(root, load):
    root.mkdir()
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (50, 200, 90)]
    for suffix in ("gif", "webp", "tiff"):
        frames[0].save(root / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert abs(load(order=data.MIXED).astype(int) - 50).max() <= 2


def test_deep_tiffs_keep_their_high_byte(root, load, caplog):
    deep = RNG.integers(0, 2**16, (8, 8)).astype(np.uint16)
    save(deep, root / "a.tiff")
    np.testing.assert_array_equal(
        load(image_shape=(8, 8, 1), order=data.MIXED)[0, ..., 0], deep >> 8
    )
    (line,) = warnings(caplog)
    assert line.endswith("converted 1 from 16 to 8 bits")


def test_a_bitmap_of_16_bytes_a_row_has_8_bits(root, load, caplog):
    save(noise(8, 5, 3), root / "a.bmp")
    load(order=data.MIXED)
    assert not warnings(caplog)


def test_what_is_left_out_is_counted_once(root, load, caplog):
    save(noise(8, 8, 3), root / "cats" / "a.png")
    for name in ("a.txt", "b.txt", "c.avif", "LICENSE", ".hidden"):
        (root / name).touch()
    load(order=data.MIXED)
    load("cats", order=data.MIXED)
    assert warnings(caplog) == [f"folder {root}: left out 2 .txt, 1 .avif, 1 no suffix"]


# Links


def test_class_folders_may_be_links(root, load, tmp_path):
    image = save(noise(8, 8, 3), tmp_path / "elsewhere" / "deep" / "a.png")
    root.mkdir()
    for name in ("cats", "dogs"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    np.testing.assert_array_equal(load(order=data.MIXED), [image, image])
    np.testing.assert_array_equal(load("dogs", order=data.MIXED), [image])
    with pytest.raises(UserError, match="no picture"):
        load(order="mixed")  # as a run of an older version, which did not follow them


def test_links_that_lead_back_are_not_followed(root, load):
    image = save(noise(8, 8, 3), root / "cats" / "a.png")
    (root / "cats" / "self").symlink_to(root / "cats")
    (root / "cats" / "up").symlink_to(root)
    (root / "gone").symlink_to(root / "nowhere")
    np.testing.assert_array_equal(load(order=data.MIXED), [image])


# Names of splits


@pytest.mark.parametrize("name", ["my cats", "a+b", "train.v2", "x[1]", "ü (1)", "all.old"])
def test_folders_of_any_name_are_splits(root, load, name):
    images = [save(noise(8, 8, 3), root / name / f"{i}.png") for i in range(4)]
    dog = save(noise(8, 8, 3), root / "dogs" / "a.png")
    np.testing.assert_array_equal(load(name), images)
    np.testing.assert_array_equal(load(f"{name}[50%:]"), images[2:])
    np.testing.assert_array_equal(load(f"dogs + {name}[-1:]"), [dog, images[-1]])
    with pytest.raises(UserError, match=re.escape(f"{name}[:1%] rounds to no image")):
        load(f"{name}[:1%]")


def test_a_sum_of_folders_stays_a_sum(root, load):
    a, b = (save(noise(8, 8, 3), root / name / "1.png") for name in ("a", "b"))
    save(noise(8, 8, 3), root / "a+b" / "1.png")
    np.testing.assert_array_equal(load("a+b"), [a, b])


def test_a_message_names_ten_splits(root, load):
    for number in range(40):
        save(noise(2, 2, 3), root / f"class{number:02d}" / "a.png")
    with pytest.raises(UserError, match=r"class08 \(1 images\) and 31 more; parts") as error:
        load("class99")
    assert len(str(error.value)) < 700


# Errors


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
    refused(f"{name} (", of=2)


def huge():
    """A PNG that claims 3.6 billion pixels."""
    file = bytearray(encode(noise(1, 1, 3), Kind("RGB", 8)))
    file[16:24] = struct.pack(">II", 60_000, 60_000)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


def test_all_files_that_cannot_be_decoded_are_in_one_message(root, load, refused, caplog):
    images = [save(noise(8, 8, 3), root / f"good{number}.png") for number in range(3)]
    save(noise(8, 8), root / "grey.png")
    (root / "a_empty.png").touch()
    (root / "b_text.jpg").write_text("no image at all")
    Image.fromarray(noise(8, 8)).save(root / "c_pcx.png", format="pcx")
    save(noise(40, 40, 3), root / "d_short.jpg")
    os.truncate(root / "d_short.jpg", 800)
    (root / "e_huge.png").write_bytes(huge())
    (root / "f_gone.png").symlink_to(root / "nowhere.png")
    (root / "g_directory.jpg").mkdir()  # and is no file, so it is left out
    refused(
        "a_empty.png (no picture of a known format)",
        "b_text.jpg (no picture of a known format)",
        "c_pcx.png (no picture of a known format)",
        "d_short.jpg (image file is truncated",
        "e_huge.png (60000 x 60000 pixels; at most 268,435,456 are read: make it smaller)",
        "f_gone.png (No such file or directory)",
        of=10,
    )
    assert not warnings(caplog)
    for bad in root.glob("[a-f]_*"):
        bad.unlink()
    np.testing.assert_array_equal(load()[:3], images)


def test_a_message_names_ten_files(root, refused):
    save(noise(8, 8, 3), root / "good.png")
    for number in range(13):
        (root / f"{number:02d}.png").touch()
    files = [f"{number:02d}.png" for number in range(13)]
    refused(*files, of=14, named=10)


def test_only_files_of_the_split_count(root, load):
    image = save(noise(8, 8, 3), root / "good" / "a.png")
    (root / "bad").mkdir()
    (root / "bad" / "a.png").touch()
    np.testing.assert_array_equal(load("good"), [image])


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
        data.load("folder", "all", image_shape=(8, 8, 3), data_dir=place)


def test_no_images(root, load):
    root.mkdir()
    with pytest.raises(UserError, match=r"dataset\.data_dir=.*there is no picture in it"):
        load()


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ("birds", r"dataset\.split.*'birds'.* has all \(2 images\), cats \(1 images\)"),
        ("all[", r"'all\['"),
        ("", "''"),
        ("all[1:1]", "it holds no image"),
        ("all[2:1]", "it holds no image"),
        ("all[-1%:]", r"all\[-1%:\] rounds to no image"),
        ("all[-0%:]", r"all\[-0%:\] rounds to no image"),
        ("all[:1%]", r"all\[:1%\] rounds to no image"),
        ("cats+all[:1%]", r"all\[:1%\] rounds to no image"),
        ("all[99.9%:]+cats", r"all\[99.9%:\] rounds to no image"),
        ("all[:-99%]", r"all\[:-99%\] rounds to no image"),
        ("all[:3]", r"'all\[:3\]'"),
    ],
)
def test_bad_splits(root, load, split, match):
    save(noise(8, 8, 3), root / "cats" / "a.png")
    save(noise(8, 8, 3), root / "b.png")
    with pytest.raises(UserError, match=match):
        load(split)


def test_a_pipe_among_the_pictures_is_named(root, refused):
    save(noise(8, 8, 3), root / "a.png")
    os.mkfifo(root / "b.png")
    refused("b.png (a device or a pipe, no file)", of=2)


@pytest.mark.parametrize(
    ("split", "workdir"),
    [
        *[("all[:90%]", "runs/a"), ("train", "train"), ("test+train[:1]", "train/runs/a")],
        *[("all", "."), ("a+b", "a+b/run"), ("train + x[1][:50%]", "x[1]/run")],
    ],
)
def test_a_run_does_not_write_among_its_pictures(root, split, workdir):
    for top in ("train", "test", "a+b", "x[1]"):
        for i in range(2):
            save(noise(8, 8, 3), root / top / f"{i}.png")
    dataset = {"name": "folder", "data_dir": str(root), "split": split, "eval_split": "test"}
    dataset["cache_dir"] = ""
    message = rf"^--workdir={re.escape(str(root / workdir))} lies among the pictures of "
    with pytest.raises(UserError, match=message):
        data.check_outside(dataset, root / workdir)
    data.check_outside(dataset, root.parent / "runs")
    data.check_outside(dataset | {"split": "train"}, root / "runs" / "a")
    data.check_outside(dataset | {"name": "array"}, root / workdir)
