"""Pixels to numbers and back, grids of pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svae_jax import pixels
from svae_jax.evaluation import grids

LEVELS = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_every_level_survives_the_round_trip(wrap):
    values = wrap(pixels.UINT8.to_float)(LEVELS)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, LEVELS / 127.5 - 1, atol=2e-7)
    np.testing.assert_array_equal(values, -values[::-1])
    assert (values[0], values[255]) == (-1, 1)  # exactly, compiled or not
    back = wrap(pixels.to_uint8)(values)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, LEVELS)


def test_to_uint8_rounds_clips_and_takes_nan():
    values = jnp.array([-7.0, -1 + 0.9 / 127.5, 0.001, 1.01, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(pixels.to_uint8(values), [0, 1, 128, 255, 255, 0])


def test_to_uint8_of_bfloat16_is_computed_in_float32():
    values = jnp.linspace(-1, 1, 200).astype(jnp.bfloat16)
    expected = np.round((np.asarray(values, np.float64) + 1) * 127.5)
    np.testing.assert_array_equal(pixels.to_uint8(values), expected)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    c=st.sampled_from([1, 3]),
    columns=st.none() | st.integers(1, 45),
    padding=st.integers(0, 3),
    min_tile=st.integers(1, 20),
)
def test_a_grid_holds_every_image_in_its_cell_on_white(n, h, w, c, columns, padding, min_tile):
    batch = np.random.default_rng(n).integers(0, 255, (n, h, w, c), dtype=np.uint8)  # no 255
    picture = grids.grid(batch, columns, padding, min_tile)
    factor = next(k for k in range(1, 100) if k * max(h, w) >= min_tile)
    pitch_h, pitch_w = h * factor + padding, w * factor + padding
    rows, cells = (picture.shape[0] - padding) // pitch_h, (picture.shape[1] - padding) // pitch_w
    assert picture.shape == (rows * pitch_h + padding, cells * pitch_w + padding, c)
    assert cells * (rows - 1) < n <= cells * rows
    assert columns is None or cells == min(columns, n)
    for i, image in enumerate(batch):
        top, left = padding + i // cells * pitch_h, padding + i % cells * pitch_w
        tile = picture[top : top + h * factor, left : left + w * factor]
        np.testing.assert_array_equal(tile[::factor, ::factor], image)
        np.testing.assert_array_equal(tile[factor - 1 :: factor, factor - 1 :: factor], image)
        tile[:] = 255
    assert (picture == 255).all()


@pytest.mark.parametrize(("n", "rows", "columns"), [(64, 8, 8), (32, 4, 8), (7, 3, 3), (1, 1, 1)])
def test_the_default_layout_is_near_a_square_without_short_rows(n, rows, columns):
    picture = grids.grid(np.zeros((n, 5, 5, 3), np.uint8), padding=1, min_tile=1)
    assert picture.shape[:2] == (rows * 6 + 1, columns * 6 + 1)


def test_small_images_become_legible_and_batch_axes_flatten():
    batch = np.zeros((2, 2, 32, 32, 3), np.float32)
    picture = grids.grid(batch)
    assert picture.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    assert picture[2, 2, 0] == 128  # 0 lies between the levels 127 and 128, and rounds to even


def test_a_grid_of_device_arrays_is_on_the_host():
    assert isinstance(grids.grid(jnp.zeros((4, 8, 8, 1))), np.ndarray)


def test_reconstructions_lie_right_below_their_originals():
    originals = np.stack([np.full((4, 4, 1), i, np.uint8) for i in range(5)])
    reconstructions = (originals + 100).astype(np.uint8)
    picture = grids.pairs(originals, reconstructions, columns=3, padding=2, min_tile=1)
    # Down a column: border, original, gap, reconstruction, wide gap, and the next pair.
    assert picture.shape == (2 + (4 + 2 + 4) + 8 + (4 + 2 + 4) + 2, 3 * 6 + 2, 1)
    for i in range(5):
        top, left = 2 + i // 3 * 18, 2 + i % 3 * 6
        assert (picture[top : top + 4, left : left + 4] == i).all()
        assert (picture[top + 4 : top + 6, left : left + 4] == 255).all()
        assert (picture[top + 6 : top + 10, left : left + 4] == i + 100).all()
    assert (picture[12:20] == 255).all()


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_other_numbers_of_channels_stand_side_by_side(channels):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, channels)).astype(np.uint8)
    tiles = [np.concatenate([*np.moveaxis(image, -1, 0)], axis=1)[..., None] for image in images]
    expected = grids.grid(np.stack(tiles), min_tile=1)
    assert expected.shape[-1] == 1
    np.testing.assert_array_equal(grids.grid(images, min_tile=1), expected)
    both = grids.pairs(images, images, min_tile=1)
    np.testing.assert_array_equal(both, grids.pairs(np.stack(tiles), np.stack(tiles), min_tile=1))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: grids.grid(x[:0]), "images"),
        (lambda x: grids.grid(x, columns=-1), "columns"),
        (lambda x: grids.grid(x, columns=0), "columns"),
        (lambda x: grids.grid(x, min_tile=0), "min_tile"),
        (lambda x: grids.grid(x, padding=-1), "padding"),
        (lambda x: grids.pairs(x, x[:2]), "reconstructions"),
    ],
)
def test_bad_arguments_are_named(call, named):
    # Where the shape itself breaks the annotation, the tests' type checker may speak first.
    with pytest.raises(Exception, match=named):
        call(np.zeros((3, 4, 4, 3), np.uint8))
