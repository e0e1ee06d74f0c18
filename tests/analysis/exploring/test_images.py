"""`images.prepare`: images in any form are the same images, or one clear line."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from svae_jax.analysis.exploring import images
from svae_jax.errors import UserError

SIZE = {"image_shape": (8, 8, 3)}


@pytest.fixture
def levels():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def test_all_forms_are_the_same_images(levels, tmp_path):
    expected = levels / 127.5 - 1
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    pictures = [Image.fromarray(image) for image in levels]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    floats = expected.astype(np.float64)
    forms = (levels, jnp.asarray(levels), floats, list(levels), paths, pictures)
    for form in (*forms, [str(paths[0]), levels[1]], (pictures[0], paths[1])):
        prepared = images.prepare(form, **SIZE)
        assert prepared.dtype == np.float32
        np.testing.assert_allclose(prepared, expected, atol=1e-6)
    for one in (levels[0], floats[0], paths[0], str(paths[0]), pictures[0]):
        np.testing.assert_allclose(images.prepare(one, **SIZE), expected[:1], atol=1e-6)


def test_pictures_of_another_size_are_cut_to_a_square(tmp_path):
    picture = np.zeros((16, 48, 3), np.uint8)
    picture[:, 16:32] = 200  # the central square
    picture = Image.fromarray(picture)
    prepared = images.prepare(picture, **SIZE)
    np.testing.assert_allclose(prepared, 200 / 127.5 - 1, atol=1e-6)
    assert picture.size == (48, 16)


def test_floats_that_are_never_negative_are_told_once(levels, caplog):
    images._warn_range.cache_clear()
    floats = levels.astype(np.float32) / 255
    shape = levels.shape[-3:]
    images.prepare(2 * floats - 1, image_shape=shape)
    images.prepare(np.zeros_like(floats), image_shape=shape)
    assert not caplog.records
    for _ in range(2):
        found = images.prepare(floats, image_shape=shape)
    np.testing.assert_array_equal(found.reshape(floats.shape), floats)  # as they always were
    (record,) = caplog.records
    assert "if 0 is black, give 2 * images - 1" in record.getMessage()


def test_grey_images_need_no_channel(levels):
    grey = levels[..., 0]
    for form, count in ((grey, 2), (grey[0], 1), (grey[..., None], 2)):
        prepared = images.prepare(form, image_shape=(8, 8, 1))
        np.testing.assert_allclose(prepared[..., 0], grey[:count] / 127.5 - 1, atol=1e-6)


MISTAKES = {
    "size": (
        np.zeros((2, 9, 8, 3), np.uint8),
        r"\[2, 9, 8, 3\] is not .* \[8, 8, 3\] or \[n, 8, 8",
    ),
    "channels": (np.zeros((8, 8), np.uint8), r"\[8, 8\] is not .* \[8, 8, 3\]"),
    "none": (np.zeros((0, 8, 8, 3), np.uint8), r"\[0, 8, 8, 3\] is not"),
    "axes": (np.zeros((1, 1, 8, 8, 3), np.uint8), "is not that of"),
    "integers": (np.zeros((8, 8, 3), int), "uint8 levels or floats .* got dtype int64"),
    "range": (np.full((8, 8, 3), 255.0), r"\[-1, 1\], got 255 to 255"),
    "NaN": (np.full((8, 8, 3), np.nan), r"\[-1, 1\], got nan"),
    "empty": ([], "there is none"),
    "file": ("missing.png", r"images: 1 of 1 .*missing\.png"),
    "number": ([1.0], "float is not an array, a path"),
}


@pytest.mark.parametrize(("given", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        images.prepare(given, **SIZE)
    assert "\n" not in str(error.value)
