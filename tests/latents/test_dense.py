"""Against dense Gaussians of covariance kron(Ω, Ψ), computed by SciPy and NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tests.latents.oracles import (
    POSTERIORS,
    dense_covariance,
    every_posterior,
    gaussian_kl,
    numpy_mean,
    numpy_sides,
    one_of_each_name,
    random_params,
)

pytestmark = pytest.mark.usefixtures("x64")

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def dense_maps(post, params):
    """Mean ``[hw]`` and covariance ``[hw, hw]`` of every map of one example."""
    mean = numpy_mean(params)
    return [(mean[:, :, n].ravel(), dense_covariance(params, n)) for n in range(post.maps)]


@every_posterior
def test_mean_and_stddev(post):
    params = random_params(post)
    maps = dense_maps(post, params)
    shape = (post.height, post.width)
    mean = np.stack([mean.reshape(shape) for mean, _ in maps], axis=-1)
    stddev = np.stack([np.sqrt(np.diag(cov)).reshape(shape) for _, cov in maps], axis=-1)
    np.testing.assert_allclose(post.mean(params), mean, **TIGHT)
    np.testing.assert_allclose(post.stddev(params), stddev, **TIGHT)


@every_posterior
def test_covariance(post):
    params = random_params(post, (2,))
    covariance = post.covariance(params)
    for i in range(2):
        one = {name: array[i] for name, array in params.items()}
        expected = [dense_covariance(one, n) for n in range(post.maps)]
        np.testing.assert_allclose(covariance[i], expected, **TIGHT)


@every_posterior
def test_kl_per_map(post):
    params = random_params(post)
    expected = [gaussian_kl(mean, cov) for mean, cov in dense_maps(post, params)]
    np.testing.assert_allclose(post.kl_per_map(params), expected, **TIGHT)


@every_posterior
def test_log_prob(post):
    params = random_params(post)
    z = np.random.default_rng(1).normal(size=(post.height, post.width, post.maps))
    expected = sum(
        stats.multivariate_normal(mean, cov).logpdf(z[:, :, n].ravel())
        for n, (mean, cov) in enumerate(dense_maps(post, params))
    )
    np.testing.assert_allclose(post.log_prob(params, jnp.asarray(z)), expected, **TIGHT)


@pytest.mark.parametrize("name", ["mvn", "lowrank", "mvn_full", "lowrank_full"])
def test_log_prob_is_scipys_matrix_normal(name):
    post = POSTERIORS[name]
    params = random_params(post)
    z = np.random.default_rng(1).normal(size=(post.height, post.width, post.maps))
    expected = 0.0
    for n in range(post.maps):
        omega, psi = numpy_sides(params, n)
        mean = numpy_mean(params)[:, :, n]
        expected += stats.matrix_normal(mean, rowcov=omega, colcov=psi).logpdf(z[:, :, n])
    np.testing.assert_allclose(post.log_prob(params, jnp.asarray(z)), expected, **TIGHT)


@every_posterior
def test_colour_is_a_root_of_the_covariance_and_whiten_its_inverse(post):
    """The unit noises, coloured, are the columns of S, and SSᵀ is the covariance."""
    params = random_params(post)
    entries = post.height * post.width
    units = np.eye(entries).reshape(entries, post.height, post.width, 1)
    units = jnp.asarray(np.broadcast_to(units, (*units.shape[:-1], post.maps)))
    colour, whiten = post.covariance_model.colour, post.covariance_model.whiten
    columns = jax.vmap(colour, in_axes=(None, 0))(params, units)
    for n in range(post.maps):
        root = np.asarray(columns[..., n]).reshape(entries, entries).T
        np.testing.assert_allclose(root @ root.T, dense_covariance(params, n), **TIGHT)
    back = jax.vmap(whiten, in_axes=(None, 0))(params, columns)
    np.testing.assert_allclose(back, units, **TIGHT)


@every_posterior
def test_samples_are_coloured_white_noise(post):
    """The noise of `sample` does not depend on the parameters: it is reparameterised."""
    key = jax.random.key(0)
    params = random_params(post)
    at_prior = post.unpack(jnp.zeros(post.num_params))
    noise = post.sample(key, at_prior)
    expected = post.mean(params) + post.covariance_model.colour(params, noise)
    np.testing.assert_allclose(post.sample(key, params), expected, **TIGHT)


@one_of_each_name
def test_sample_and_log_prob_is_sample_and_its_log_prob(post):
    @jax.jit
    def both_ways(key, params):
        z = post.sample(key, params)
        return post.sample_and_log_prob(key, params), (z, post.log_prob(params, z))

    together, apart = both_ways(jax.random.key(0), random_params(post, (4,)))
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, **TIGHT)
