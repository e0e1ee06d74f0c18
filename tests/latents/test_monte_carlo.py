"""Against averages over samples, within their standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from svae_jax import latents
from tests.latents.oracles import (
    POSTERIORS,
    call,
    dense_covariance,
    every_posterior,
    numpy_mean,
    random_params,
)

SAMPLES = 20_000
STANDARD_ERRORS = 4.5  # some hundred comparisons, each with a fixed key


def draw(post, params):
    """Samples ``[SAMPLES, h, w, n]`` of one example and their log q ``[SAMPLES]``."""
    copies = {name: jnp.broadcast_to(leaf, (SAMPLES, *leaf.shape)) for name, leaf in params.items()}
    z, log_q = call(post, "sample_and_log_prob", jax.random.key(7), copies)
    return np.asarray(z), np.asarray(log_q)


def assert_mean_is(values, expected):
    """The mean of `values` over their first axis is as expected, within its standard error."""
    error = values.std(axis=0) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(axis=0) - expected) < STANDARD_ERRORS * error)


@every_posterior
@pytest.mark.usefixtures("x64")
def test_kl_mean_and_covariance(post):
    params = random_params(post, seed=3)
    z, log_q = draw(post, params)

    log_p = stats.norm.logpdf(z).sum(axis=(1, 2, 3))
    assert_mean_is(log_q - log_p, np.asarray(post.kl(params)))

    mean = numpy_mean(params)
    assert_mean_is(z, mean)
    for n in range(post.maps):
        deviation = (z - mean)[..., n].reshape(SAMPLES, -1)
        products = deviation[:, :, None] * deviation[:, None, :]
        covariance = dense_covariance(params, n)
        zeros = np.isclose(covariance, 0)
        assert_mean_is(products[:, ~zeros], covariance[~zeros])
        assert_mean_is(products[:, zeros], 0)


@pytest.mark.parametrize("name", ["naive", "mvn_full"])
def test_maps_and_examples_are_drawn_independently(name):
    post = POSTERIORS[name]
    params = post.unpack(jnp.zeros((SAMPLES, 2, post.num_params)))
    z = np.asarray(call(post, "sample", jax.random.key(2), params)).reshape(SAMPLES, -1)
    correlation = z.T @ z / SAMPLES
    error = 1 / np.sqrt(SAMPLES)
    assert np.all(np.abs(correlation - np.eye(z.shape[1])) < STANDARD_ERRORS * np.sqrt(2) * error)


def test_prior_is_standard_normal():
    z = latents.sample_prior(jax.random.key(0), (100, 10), height=3, width=2, maps=4)
    assert z.shape == (100, 10, 3, 2, 4)
    assert z.dtype == jnp.float32
    assert stats.kstest(np.asarray(z).ravel(), "norm").pvalue > 0.01


def test_prior_of_no_batch():
    assert latents.sample_prior(jax.random.key(0), (), height=3, width=2, maps=4).shape == (3, 2, 4)
