"""The sliced Wasserstein distance, against SciPy patch by patch and direction by direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from svae_jax.evaluation.quality import wasserstein

KEY = jax.random.key(0)


def scenes(count, size=32, channels=3, seed=0):
    """Images of a bright rectangle on a smooth ground, with some noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(20, 90, (count, 1, 1, channels)) + rng.normal(
        0, 6, (count, size, size, channels)
    )
    for image in images:
        y, x = rng.integers(0, size // 2, 2)
        image[y : y + size // 3, x : x + size // 2] += rng.integers(40, 120, channels)
    return np.clip(images, 0, 255).astype(np.uint8)


def distances(a, b, **kwargs):
    found = wasserstein.sliced_wasserstein(KEY, a, b, num_groups=0, **kwargs)
    assert found.mean.value == pytest.approx(np.mean([level.value for level in found.levels]))
    return [level.value for level in found.levels]


def scipy_pyramid(image, num_levels):
    """The Laplacian pyramid of one channel with SciPy's 2-D convolution."""
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    bands, current = [], image.astype(np.float64)
    for _ in range(num_levels - 1):
        coarse = scipy.ndimage.convolve(current, kernel, mode="mirror")[::2, ::2]
        spread = np.zeros_like(current)
        spread[::2, ::2] = coarse
        bands.append(current - scipy.ndimage.convolve(spread, 4 * kernel, mode="mirror"))
        current = coarse
    return [*bands, current]


@pytest.mark.parametrize(("size", "num_levels"), [(64, 3), (32, 2), (37, 2), (16, 1), (8, 1)])
def test_the_pyramid_is_scipys(size, num_levels):
    images = scenes(2, size, 3)
    assert len(wasserstein._level_sizes(size, size)) == num_levels
    for level in range(num_levels):
        actual = wasserstein.laplacian_level(jnp.asarray(images, jnp.float32), level, num_levels)
        assert wasserstein._level_sizes(size, size)[level] == actual.shape[1]
        for i in range(2):
            for c in range(3):
                expected = scipy_pyramid(images[i, :, :, c], num_levels)[level]
                np.testing.assert_allclose(actual[i, :, :, c], expected, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_distance_is_scipys_over_the_same_places_and_directions(channels):
    count = 300  # patches: 7 or 8 of each of 40 images, 5 or 6 of each of 55
    sets = scenes(40, 33, channels), 255 - scenes(55, 33, channels, seed=1)
    actual = distances(*sets, max_patches=count)
    assert len(actual) == 2
    for level in range(2):
        places, directions = jax.random.split(jax.random.fold_in(KEY, level))
        directions = np.asarray(jax.random.normal(directions, (512, 49 * channels)), np.float64)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        points = []
        for images in sets:
            bands = [[scipy_pyramid(x[..., c], 2)[level] for c in range(channels)] for x in images]
            last = jnp.array(bands[0][0].shape) - 7
            key, rounds = jax.random.fold_in(places, 0), -(-count // len(images))
            corners = jax.random.randint(key, (rounds, len(images), 2), 0, last + 1)
            patches = [
                np.stack([band[y : y + 7, x : x + 7] for band in bands[i]], axis=-1)
                for of_round in np.asarray(corners)
                for i, (y, x) in enumerate(of_round)
            ]
            patches = np.array(patches[:count])
            patches = (patches - patches.mean((0, 1, 2))) / patches.std((0, 1, 2))
            points.append(patches.reshape(count, -1))
        expected = [
            scipy.stats.wasserstein_distance(points[0] @ v, points[1] @ v) for v in directions
        ]
        assert actual[level] == pytest.approx(np.mean(expected), rel=1e-4)


def test_identical_sets_are_at_zero_and_the_order_of_the_sets_does_not_matter():
    a, b = scenes(60), scenes(60, seed=1)
    few = {"max_patches": 1000}
    assert distances(a, a.copy(), **few) == [0, 0]
    np.testing.assert_allclose(distances(a, b, **few), distances(b, a, **few), rtol=1e-5)
    assert distances(a, b, **few) == distances(a, b, **few)


@pytest.mark.parametrize("spoil", ["noise", "blur"])
def test_it_grows_with_noise_and_with_blur(spoil):
    clean, rng = scenes(300).astype(np.float64), np.random.default_rng(5)

    def spoiled(strength):
        if spoil == "noise":
            images = clean + rng.normal(0, strength * 20, clean.shape)
        else:
            images = scipy.ndimage.gaussian_filter(clean, (0, strength, strength, 0))
        return np.clip(images, 0, 255).astype(np.uint8)

    held_out = scenes(300, seed=1)
    finest = [distances(spoiled(s), held_out, max_patches=4000)[0] for s in (0, 0.6, 1.2, 2.4)]
    assert finest == sorted(finest)
    assert finest[1] > 1.5 * finest[0]


def test_the_standard_error_is_the_spread_over_new_sets_of_images():
    results = [
        wasserstein.sliced_wasserstein(
            KEY,
            scenes(200, 16, 1, seed=i),
            255 - scenes(200, 16, 1, seed=100 + i),
            max_patches=2000,
        ).mean
        for i in range(12)
    ]
    spread = np.std([r.value for r in results], ddof=1)
    claimed = np.mean([r.standard_error for r in results])
    assert 0.4 < claimed / spread < 2.5


def test_too_few_images_have_no_standard_error():
    found = wasserstein.sliced_wasserstein(KEY, scenes(5, 16), scenes(7, 16, seed=1))
    assert np.isnan(found.mean.standard_error)
    assert found.mean.value > 0
    assert found.sizes == (16,)


@pytest.mark.parametrize(
    ("a", "b", "options", "named"),
    [
        (scenes(3, 16), scenes(3, 32), {}, "reference"),
        (scenes(3, 16)[:0], scenes(3, 16), {}, "reference"),
        (scenes(3, 6), scenes(3, 6), {}, "7 or more pixels"),
        (scenes(3, 16), scenes(3, 16), {"max_patches": 0}, "max_patches"),
    ],
)
def test_bad_arguments_are_named(a, b, options, named):
    # Where the shapes break the annotation, the tests' type checker may speak first.
    with pytest.raises(Exception, match=named):
        wasserstein.sliced_wasserstein(KEY, a, b, **options)
