"""Distances between sets of features, against SciPy and brute force in NumPy."""

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.spatial.distance

from svae_jax.evaluation.quality import frechet, kernel, neighbours

KEY = jax.random.key(0)


def features(n, d=12, seed=0, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d))
    return ((scale * rng.standard_normal((n, d)) + shift) @ mixing).astype(np.float32)


def distance(a, b):
    return frechet.distance_of_gaussians(frechet.fit(a), frechet.fit(b))


def test_the_frechet_distance_is_scipys():
    a, b = features(5000), features(300, seed=1, shift=0.3, scale=1.4)  # one set in several blocks
    means, covariances = zip(
        *((x.mean(0, dtype=np.float64), np.cov(x, rowvar=False, dtype=np.float64)) for x in (a, b)),
        strict=True,
    )
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(sum(covariances) - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-8)
    estimate = frechet.frechet_distance(KEY, a, b, num_replicates=20)
    assert estimate.value == distance(a, b)
    new = [distance(features(5000, seed=s), features(300, seed=50 + s, shift=0.3, scale=1.4))
           for s in range(2, 30)]  # fmt: skip
    assert 0.5 < estimate.standard_error / np.std(new) < 2


def test_the_frechet_distance_of_a_set_to_itself_is_zero_even_if_singular():
    few = features(20, d=60)  # rank 19
    scale = np.trace(frechet.fit(few).covariance)
    assert abs(distance(few, few)) < 1e-12 * scale
    moved = few.astype(np.float64) + 0.5
    assert distance(few.astype(np.float64), moved) == pytest.approx(60 * 0.25, abs=1e-10 * scale)


@pytest.mark.parametrize("spoil", ["noise", "blur"])
def test_frechet_and_kernel_distance_grow_with_noise_and_with_blur(spoil):
    rng = np.random.default_rng(0)
    images = scipy.ndimage.gaussian_filter(rng.standard_normal((1200, 8, 8)), (0, 1, 1))
    clean, held_out = np.split(images, 2)

    def spoiled(strength):
        if spoil == "noise":
            return clean + 0.3 * strength * rng.standard_normal(clean.shape)
        return scipy.ndimage.gaussian_filter(clean, (0, strength, strength))

    flat = [np.float32(spoiled(s).reshape(600, -1)) for s in (0.0, 0.5, 1.0, 2.0)]
    reference = np.float32(held_out.reshape(600, -1))
    for figure in (distance, lambda a, b: kernel.squared_mmd(a, b)):
        values = [figure(x, reference) for x in flat]
        assert values == sorted(values)


def test_the_kernel_distance_of_one_block_is_the_double_sum():
    a, b = features(7), features(5, seed=1, shift=0.5)

    def k(x, y):
        return (np.dot(x.astype(np.float64), y) / 12 + 1) ** 3

    within = [
        sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j)
        / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    between = np.mean([[k(x, y) for y in b] for x in a])
    assert kernel.squared_mmd(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-10)


def test_the_kernel_distance_is_unbiased_and_its_error_is_right():
    estimates = [
        kernel.kernel_distance(KEY, features(200, seed=s), features(250, seed=100 + s))
        for s in range(40)
    ]
    values = np.array([e.value for e in estimates])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(40)
    assert np.mean([e.standard_error for e in estimates]) == pytest.approx(values.std(), rel=0.5)
    # All rows are used: blocks of the whole sets' size are one block each, in another order.
    a, b = features(40), features(44, seed=1, shift=0.5)
    assert kernel.kernel_distance(KEY, a[:3], b[:3]).value == pytest.approx(
        kernel.squared_mmd(a[:3], b[:3]), rel=1e-9
    )
    assert kernel.kernel_distance(KEY, a, b).value > 0


def brute_force(real, fake, k):
    """The formulas of Naeem et al. (2020), from the full matrices of distances."""
    cdist = scipy.spatial.distance.cdist
    real_radii, fake_radii = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake))
    between = cdist(real, fake)
    return (
        (between < real_radii[:, None]).any(axis=0).mean(),
        (between < fake_radii[None, :]).any(axis=1).mean(),
        (between < real_radii[:, None]).sum(axis=0).mean() / k,
        (between.min(axis=1) < real_radii).mean(),
    )


@pytest.mark.parametrize("rows_at_a_time", [256, 7])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_are_brute_forces(monkeypatch, k, rows_at_a_time):
    monkeypatch.setattr(neighbours, "_ROWS_AT_A_TIME", rows_at_a_time)
    # The block size is read while tracing: sizes of their own per case keep the traces apart.
    real = features(300 + rows_at_a_time, d=6) + 100  # far from the origin
    fake = features(211, d=6, seed=1, shift=0.4, scale=0.8) + 100
    found = neighbours.manifolds(fake, real, k=k)
    np.testing.assert_allclose([e.value for e in found], brute_force(real, fake, k), rtol=1e-6)
    inside = found.precision.value
    expected = np.sqrt(inside * (1 - inside) / 210)
    assert found.precision.standard_error == pytest.approx(expected, rel=1e-6)


def test_tied_neighbours_count_one_by_one():
    points = np.array([[0.0], [1.0], [-1.0], [3.0], [-4.0]], np.float32)
    # From 0: 1, 1, 3, 4. A mean row is subtracted, so the distances are exact here.
    radii = [float(np.sqrt(neighbours._squared_radii(points - points.mean(), k)[0])) for k in
             (1, 2, 3, 4)]  # fmt: skip
    np.testing.assert_allclose(radii, [1, 1, 3, 4], rtol=1e-5)


def test_far_sets_do_not_cover_each_other_and_equal_sets_do():
    a = features(80)
    assert [e.value for e in neighbours.manifolds(a + 1e4, a)] == [0, 0, 0, 0]
    same = neighbours.manifolds(a, a)
    assert (same.precision.value, same.recall.value, same.coverage.value) == (1, 1, 1)


@pytest.mark.parametrize("block_bytes", [2**28, 3000])
def test_nearest_images_are_brute_forces(monkeypatch, block_bytes):
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (70, 5, 5, 3), dtype=np.uint8)
    samples = rng.integers(0, 256, (33, 5, 5, 3), dtype=np.uint8)
    samples[4] = training[61]
    found = neighbours.nearest(samples, training)
    full = scipy.spatial.distance.cdist(
        *(x.reshape(len(x), -1).astype(np.float64) for x in (samples, training))
    )
    np.testing.assert_array_equal(found.indices, full.argmin(axis=1))
    np.testing.assert_allclose(found.distances, full.min(axis=1), rtol=1e-12)
    assert found.distances[4] == 0


def test_copies_of_training_images_are_noticed():
    rng = np.random.default_rng(0)
    held_out, fresh = rng.normal(10, 1, (2, 2000))
    good = neighbours.memorisation(KEY, fresh, held_out)
    assert abs(good.median_ratio.value - 1) < 4 * good.median_ratio.standard_error
    assert good.close_share.value == pytest.approx(0.01, abs=0.008)
    copied = np.where(np.arange(2000) < 100, 0.0, fresh)
    caught = neighbours.memorisation(KEY, copied, held_out)
    assert caught.close_share.value > 0.05


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: frechet.fit(x[:1]), "features"),
        (lambda x: kernel.kernel_distance(KEY, x, x[:1]), "features and reference"),
        (lambda x: neighbours.manifolds(x, x, k=0), "k=0"),
        (lambda x: neighbours.manifolds(x, x[:5], k=5), "k=5"),
        (lambda x: neighbours.nearest(x, x[:0]), "points"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(features(9))
