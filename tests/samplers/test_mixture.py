"""The mixture of Gaussians: clusters, and what it leaves to the Gaussian of the rest."""

import jax
import numpy as np
import pytest

from svae_jax import samplers
from svae_jax.samplers import aggregate
from tests.samplers.toys import clusters, encoded, of, share_between

KEY = jax.random.key(0)


def draw(sampler, posteriors, count):
    params = sampler.fit(posteriors)
    z = samplers.draw(sampler, params, KEY, count)
    return np.asarray(z, np.float64).reshape(count, -1)


def test_no_sample_lies_between_two_clusters_but_the_gaussians_do():
    posteriors = encoded(clusters(1000))
    points = draw(samplers.Mixture((2, 2, 1), components=2, noise=False), posteriors, 2000)
    assert share_between(points) < 0.02
    gaussian = samplers.Gaussian((2, 2, 1))
    points = samplers.draw(gaussian, gaussian.fit(posteriors), KEY, 2000)
    assert share_between(np.asarray(points).reshape(2000, -1)) > 0.2


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_the_mean_and_the_covariance_of_the_means_stay(share):
    """Whatever share of the principal components the mixture models."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4))
    posteriors = encoded(clusters(2000) @ mixing + 3.0)
    moments = posteriors.moments
    points = draw(
        samplers.Mixture((2, 2, 1), components=2, share=share, noise=False), posteriors, 20_000
    )
    scale = np.sqrt(np.diag(moments.of_means))
    np.testing.assert_allclose(points.mean(axis=0) / scale, moments.mean / scale, atol=0.04)
    errors = (np.cov(points.T) - moments.of_means) / np.outer(scale, scale)
    assert np.abs(errors).max() < 0.05


def test_noise_adds_the_posteriors_mean_covariance():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 4, 4))  # of 3 maps of 2×2
    within = root @ root.transpose(0, 2, 1)
    means = rng.normal(size=(500, 12)).astype(np.float32)
    posteriors = of([aggregate.Encoded(means, (500 * within).astype(np.float32))])
    count = 20_000
    plain, noisy = (
        draw(samplers.Mixture((2, 2, 3), components=1, noise=noise), posteriors, count)
        for noise in (False, True)
    )
    # The same means under the same key, so that the difference is the noise alone.
    noise = (noisy - plain).reshape(count, 4, 3)
    for n in range(3):
        scale = np.sqrt(np.diag(within[n]))
        errors = (np.cov(noise[:, :, n].T) - within[n]) / np.outer(scale, scale)
        assert np.abs(errors).max() < 0.05
    between = np.corrcoef(noise.reshape(count, 12).T).reshape(4, 3, 4, 3)
    assert np.abs(between[:, 0, :, 1]).max() < 0.05


def test_fitting_is_deterministic():
    posteriors = encoded(clusters(300))
    sampler = samplers.Mixture((2, 2, 1), components=3)
    first, second = (sampler.fit(posteriors) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_fewer_images_than_components_are_refused():
    posteriors = encoded(clusters(5))
    with pytest.raises(ValueError, match="components must be at most the number of images, 5"):
        draw(samplers.Mixture((2, 2, 1), components=10), posteriors, 1)
