"""What values of pixels mean: their range, their levels, and the way to [-1, 1] and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svae_jax.pixels import DTYPES, UINT8, PixelRange, to_uint8

LEVELS = {
    "uint8": (UINT8, np.arange(256, dtype=np.uint8)),
    "12 bits": (PixelRange("uint16", 0.0, 4095.0), np.arange(4096, dtype=np.uint16)),
    "16 bits": (PixelRange("uint16", 0.0, 65535.0), np.arange(65536, dtype=np.uint16)),
    "from 1000": (PixelRange("uint16", 1000.0, 1002.0), np.arange(1000, 1003, dtype=np.uint16)),
    "bits": (PixelRange("uint8", 0.0, 1.0), np.arange(2, dtype=np.uint8)),
}
each_range = pytest.mark.parametrize(("pixels", "levels"), LEVELS.values(), ids=LEVELS.keys())


@st.composite
def ranges_of_integers(draw):
    dtype = draw(st.sampled_from(("uint8", "uint16")))
    low = draw(st.integers(0, np.iinfo(dtype).max - 1))
    high = draw(st.integers(low + 1, np.iinfo(dtype).max))
    return PixelRange(dtype, float(low), float(high))


@st.composite
def ranges_of_floats(draw):
    """Ranges whose width is not far below their magnitude, as `images.pixel_range` demands."""
    numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
    low, width = draw(numbers), draw(st.floats(1e-3, 1e6))
    return PixelRange(draw(st.sampled_from(("float32", "float64"))), low, low + width)


@each_range
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_every_level_survives_the_round_trip(pixels, levels, wrap):
    values = wrap(pixels.to_float)(levels)
    assert values.dtype == jnp.float32
    back = pixels.from_float(values)
    assert (back.dtype, isinstance(back, np.ndarray)) == (levels.dtype, True)
    np.testing.assert_array_equal(back, levels)
    np.testing.assert_allclose(values[jnp.array([0, -1])], [-1, 1], atol=1e-6)
    np.testing.assert_array_equal(values, -values[::-1])
    assert pixels.num_levels == len(levels)
    np.testing.assert_allclose(np.diff(values), 2 * pixels.half_bin, atol=3e-7)


def test_8_bits_are_the_default_and_as_ever():
    assert PixelRange() == UINT8 == PixelRange("uint8", 0.0, 255.0)
    levels = LEVELS["uint8"][1]
    np.testing.assert_allclose(UINT8.to_float(levels), levels / 127.5 - 1, atol=2e-7)
    np.testing.assert_array_equal(to_uint8(UINT8.to_float(levels)), levels)
    assert UINT8.half_bin == 1 / 255


@settings(deadline=None)  # the first example compiles
@given(pixels=ranges_of_integers(), value=st.floats(-1.5, 1.5))
def test_integers_come_back_rounded_and_within_the_range(pixels, value):
    levels = pixels.from_float(np.array([value]))
    exact = (value + 1) / 2 * (pixels.high - pixels.low) + pixels.low
    assert abs(int(levels[0]) - min(max(exact, pixels.low), pixels.high)) <= 0.5 + 1e-6
    assert abs(float(pixels.to_float(levels)[0])) <= 1 + 1e-6


@settings(deadline=None)  # the first example compiles
@given(pixels=ranges_of_floats(), share=st.floats(-0.5, 1.5))
def test_floats_survive_the_round_trip_beyond_the_range_too(pixels, share):
    width = pixels.high - pixels.low
    images = np.array([pixels.low + share * width], pixels.dtype)
    values = pixels.to_float(images)
    assert values.dtype == jnp.float32
    # float32 resolves a number of this magnitude, not the width of the range alone.
    digits = 5e-7 * max(abs(pixels.low), abs(pixels.high), width)
    np.testing.assert_allclose(values, [2 * share - 1], rtol=0, atol=2 * digits / width + 1e-6)
    back = pixels.from_float(values)
    assert back.dtype == pixels.dtype
    np.testing.assert_allclose(back, images, rtol=0, atol=digits)
    assert pixels.num_levels is None


def test_half_precision_comes_back_in_half_precision():
    pixels = PixelRange("float16", -2.0, 6.0)
    values = np.linspace(-2, 6, 33).astype(np.float16)
    np.testing.assert_allclose(pixels.to_float(values), np.linspace(-1, 1, 33), atol=1e-6)
    back = pixels.from_float(pixels.to_float(values))
    assert back.dtype == np.float16
    np.testing.assert_array_equal(back, values)


def test_what_is_not_a_number_becomes_the_lowest_level():
    values = np.array([np.nan, -np.inf, np.inf, 0.0])
    pixels = PixelRange("uint16", 10.0, 20.0)
    np.testing.assert_array_equal(pixels.from_float(values), [10, 10, 20, 15])
    np.testing.assert_array_equal(to_uint8(values.astype(np.float32)), [0, 0, 255, 128])


def test_the_range_is_the_same_of_any_shape_of_images():
    pixels = PixelRange("uint16", 0.0, 4095.0)
    images = np.random.default_rng(0).integers(0, 4096, (2, 3, 4, 5)).astype(np.uint16)
    np.testing.assert_array_equal(pixels.to_float(images)[1, 2], pixels.to_float(images[1, 2]))
    assert pixels.from_float(pixels.to_float(images)).shape == images.shape


def test_a_range_is_static_under_jit():
    assert hash(PixelRange()) == hash(UINT8)
    mapped = jax.jit(lambda pixels, x: pixels.to_float(x), static_argnums=0)
    assert float(mapped(PixelRange("float32", 2.0, 4.0), jnp.float32(4.0))) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int64", 0.0, 1.0), f"one of {', '.join(DTYPES)}, got int64"),
        (("bool", 0.0, 1.0), "got bool"),
        (("float32", 1.0, 1.0), "LOW below HIGH, got 1.0,1.0"),
        (("float32", 1.0, 0.0), "LOW below HIGH, got 1.0,0.0"),
        (("float32", 0.0, float("inf")), "finite numbers, LOW below HIGH, got 0.0,inf"),
        (("float32", float("nan"), 1.0), "finite numbers"),
        (("uint8", 0.0, 256.0), "two integers from 0 to 255, got 0,256"),
        (("uint8", -1.0, 255.0), "two integers from 0 to 255, got -1,255"),
        (("uint8", 0.5, 255.0), "two integers from 0 to 255, got 0.5,255"),
        (("uint16", 0.0, 65536.0), "two integers from 0 to 65535, got 0,65536"),
    ],
)
def test_what_is_no_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        PixelRange(*fields)
    assert "\n" not in str(error.value)
