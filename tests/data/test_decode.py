"""Images of every kind as 8-bit grey and RGB, against NumPy; failures in one message."""

import errno
import functools
import io
import os
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from svae_jax.data.decode import decode, to_array
from svae_jax.errors import UserError
from tests.data.pictures import KINDS, Kind, draw, encode, luma, on_white

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape).astype(np.uint8)


def opened(file):
    return Image.open(io.BytesIO(file))


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return opened(file.getvalue())


def converted(image, channels, size=None, crop=None):
    size = size or image.height
    return to_array(image, image_shape=(size, size, channels), crop=crop)


def name(kind):
    return f"{kind.colour}{kind.bits}{'key' * kind.has_key}"


# Every kind of PNG


@pytest.mark.parametrize("kind", KINDS, ids=name)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(1, 20), channels=st.sampled_from([1, 3])
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_png_of_every_kind(kind, seed, size, channels):
    file, colours, alphas = draw(np.random.default_rng(seed), kind, size, size)
    pixels, steps = converted(opened(file), channels)
    expected = on_white(colours, alphas)
    if channels == 1:
        expected = luma(expected)
    # One rounding where it is composited, another one where it becomes grey.
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1.001)
    if (alphas == 255).all() and channels == 3:
        np.testing.assert_array_equal(pixels, colours)
    told = set()
    if kind.is_grey != (channels == 1):
        told.add("grey to RGB" if kind.is_grey else "colour to grey")
    if kind.bits == 16:
        told.add("from 16 to 8 bits")
    if (alphas < 255).any():
        told.add("transparent onto white")
    assert set(steps) == told
    assert len(steps) == len(told)


def test_sixteen_bits_keep_their_high_byte():
    samples = np.arange(2**16).reshape(256, 256, 1)
    for kind in (Kind("grey", 16), Kind("RGB", 16)):
        repeated = np.repeat(samples, 3 if kind.colour == "RGB" else 1, axis=-1)
        pixels, _ = converted(opened(encode(repeated, kind)), 3)
        np.testing.assert_array_equal(pixels, np.repeat(samples >> 8, 3, axis=-1))


def test_a_transparent_grey_of_16_bits_is_compared_whole():
    samples = np.array([[[0x0102], [0x0103]], [[0x0101], [0x0202]]])
    pixels, _ = converted(opened(encode(samples, Kind("grey", 16), key=[0x0102])), 1)
    np.testing.assert_array_equal(pixels[..., 0], [[255, 1], [1, 2]])


def test_a_transparent_colour_of_16_bits_is_refused():
    file = encode(np.zeros((2, 2, 3), int), Kind("RGB", 16), key=[0, 0, 1])
    with pytest.raises(ValueError, match="16-bit colour with a transparent colour"):
        converted(opened(file), 3)


def test_transparent_pixels_do_not_bleed_when_resized():
    # Red at full and black at no opacity: only red and white may show.
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:, ::2] = [255, 0, 0, 255]
    pixels, _ = converted(saved(Image.fromarray(rgba)), 3, size=10)
    assert (pixels[..., 0] == 255).all()
    np.testing.assert_allclose(pixels[:, 1:-1, 1:], 127.5, atol=2)


# Images of other formats and modes


def test_jpeg():
    ramp = np.linspace(0, 255, 16)
    smooth = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128), -1).astype(np.uint8)
    image = saved(Image.fromarray(smooth), "JPEG", quality=100, subsampling=0)
    pixels, steps = converted(image, 3)
    np.testing.assert_allclose(pixels, smooth, atol=3)
    assert steps == []
    image = saved(Image.fromarray(smooth[..., 0]), "JPEG", quality=100)
    pixels, steps = converted(image, 3)
    np.testing.assert_allclose(pixels, np.repeat(smooth[..., :1], 3, axis=-1), atol=3)
    assert steps == ["grey to RGB"]


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk_jpeg(channels):
    ink = np.repeat(np.repeat(noise(3, 3, 4), 8, axis=0), 8, axis=1)  # blocks survive JPEG
    image = Image.frombytes("CMYK", (24, 24), ink.tobytes())
    pixels, steps = converted(saved(image, "JPEG", quality=100), channels)
    share = 1 - ink / 255.0
    expected = 255 * share[..., :3] * share[..., 3:]
    np.testing.assert_allclose(pixels, luma(expected) if channels == 1 else expected, atol=4)
    assert steps == (["colour to grey", "CMYK to RGB"] if channels == 1 else ["CMYK to RGB"])


def test_palette_with_alpha():
    colours, alphas = noise(256, 3), noise(256)
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16), "L")
    rgba = np.concatenate([colours, alphas[:, None]], -1)
    image.putpalette(rgba.tobytes(), "RGBA")
    for picture in (image, image.convert("PA")):
        pixels, steps = converted(picture, 3)
        expected = on_white(colours, alphas).reshape(16, 16, 3)
        np.testing.assert_allclose(pixels, expected, atol=0.5001)
        assert steps == ["transparent onto white"]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode} has no range"):
        converted(Image.new(mode, (2, 2)), 1)


ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_photographs_are_turned_upright(orientation, format):
    corners = np.zeros((24, 24, 3), np.uint8)
    corners[:12, :12], corners[:12, 12:], corners[12:, :12] = [255, 0, 0], [0, 255, 0], [0, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    image = saved(Image.fromarray(corners), format, exif=exif, **options)
    pixels, steps = converted(image, 3)
    atol = 8 if format == "JPEG" else 0
    np.testing.assert_allclose(pixels, ORIENTATIONS[orientation](corners), atol=atol)
    assert steps == []


def test_orientation_and_depth_together():
    samples = RNG.integers(0, 2**16, (6, 6)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, steps = converted(saved(Image.fromarray(samples), exif=exif), 1)
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(samples >> 8, -1))
    assert steps == ["from 16 to 8 bits"]


@pytest.mark.parametrize("exif", [b"junk", b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored(exif):
    grey = np.full((8, 8), 77, np.uint8)
    pixels, _ = converted(saved(Image.fromarray(grey), "JPEG", quality=100, exif=exif), 1)
    np.testing.assert_allclose(pixels, 77, atol=1)


def test_colour_profiles_are_ignored():
    image = noise(8, 8, 3)
    pixels, steps = converted(saved(Image.fromarray(image), icc_profile=b"no profile"), 3)
    np.testing.assert_array_equal(pixels, image)
    assert steps == []


@pytest.mark.parametrize("format", ["PNG", "MPO"])
def test_the_first_of_several_frames(format):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (10, 200)]
    first, second = map(Image.fromarray, frames)
    image = saved(first, format, save_all=True, append_images=[second])
    assert image.n_frames == 2
    pixels, steps = converted(image, 3)
    np.testing.assert_allclose(pixels, 10, atol=1)
    assert steps == []


def test_loaded_images_are_converted_too():
    samples = RNG.integers(0, 2**16, (6, 6)).astype(np.uint16)
    for image in (
        Image.fromarray(samples),
        Image.frombytes("I;16B", (6, 6), samples.astype(">u2").tobytes()),
    ):
        pixels, steps = converted(image, 3)
        np.testing.assert_array_equal(pixels[..., 2], samples >> 8)
        assert steps == ["grey to RGB", "from 16 to 8 bits"]


# Many images


def batches(readers, count=None, convert=None):
    convert = convert or functools.partial(to_array, image_shape=(4, 4, 3), crop=None)
    names = ((f"image {number}", read) for number, read in enumerate(readers))
    count = len(readers) if count is None else count
    return decode(names, convert, count=count, title="set", field="dataset.name='set'")


def good():
    return Image.new("RGB", (4, 4), (1, 2, 3))


def bad():
    raise OSError("damaged")


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_order_and_batches():
    images = noise(600, 4, 4, 3)
    parts = list(batches([functools.partial(Image.fromarray, image) for image in images]))
    assert [len(part) for part in parts] == [256, 256, 88]
    np.testing.assert_array_equal(np.concatenate(parts), images)


def test_conversions_are_counted_in_one_line(caplog):
    greys = [lambda: Image.new("L", (4, 4))] * 300
    clear = [lambda: Image.new("RGBA", (4, 4))] * 2 + [lambda: Image.new("LA", (4, 4))]
    list(batches([good, *greys, *clear, good]))
    assert warnings(caplog) == ["set: converted 301 grey to RGB, 3 transparent onto white"]


def test_nothing_is_said_where_nothing_is_converted(caplog):
    list(batches([good] * 3))
    assert not warnings(caplog)


@pytest.mark.parametrize("failing", [1, 10, 11, 300, 600])
def test_all_failures_are_in_one_message_at_the_end(failing, caplog):
    readers = [good] * (600 - failing) + [bad] * failing
    RNG.shuffle(readers)
    parts = []
    with pytest.raises(UserError) as error:
        parts.extend(batches(readers))
    assert sum(map(len, parts)) == 600 - failing  # so the error came last
    expected = [f"image {i} (damaged)" for i in range(600) if readers[i] is bad][:10]
    more = f" and {failing - 10} more" if failing > 10 else ""
    assert str(error.value) == (
        f"dataset.name='set': {failing} of 600 images cannot be decoded: {', '.join(expected)}"
        f"{more}; repair or remove them"
    )
    assert not warnings(caplog)


def test_no_image_is_read_twice():
    reads = []

    def read(number):
        reads.append(number)
        return good() if number % 7 else bad()

    with pytest.raises(UserError):
        list(batches([functools.partial(read, number) for number in range(300)]))
    assert sorted(reads) == list(range(300))


def test_only_a_chunk_of_images_is_read_ahead():
    alive = most = 0
    lock = threading.Lock()

    def read():
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return good()

    for part in batches([read] * 1000):
        alive -= len(part)
    assert alive == 0
    assert most <= 256


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory"),
        (MemoryError(), "MemoryError"),
        (ValueError("a\n\n  b"), "a b"),
        (ValueError("word " * 100), "…"),
    ],
)
def test_reasons_are_one_short_line(error, reason):
    def failing():
        raise error

    with pytest.raises(UserError) as raised:
        list(batches([failing]))
    assert f"{reason})" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 320


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_picture_that_the_system_cannot_read_is_not_called_damaged(number):
    def read():
        raise OSError(number, os.strerror(number), "a.png")

    convert = functools.partial(to_array, image_shape=(4, 4, 3), crop=None)
    with pytest.raises(
        UserError, match=rf"a\.png cannot be read \({os.strerror(number)}"
    ) as caught:
        list(decode(iter([("a.png", read)]), convert, count=1, title="a", field="b"))
    assert "repair or remove" not in str(caught.value)
