"""Cells given other cells: against a dense Gaussian, conditioned through its precision."""

import jax
import numpy as np
import pytest

from svae_jax import latents, samplers
from svae_jax.samplers.conditional import Factors, HasFactors, condition
from tests.latents.oracles import dense_prior, random_prior_params

SIZES = (2, 3, 2)
UNKNOWN = np.array([[True, False, True], [False, False, True]])


def sampler_and_moments(name):
    """A Gaussian sampler, its arrays, and the mean and covariance of the flattened latent."""
    rng = np.random.default_rng(1)
    if name == "gaussian":
        factor = np.tril(rng.normal(size=(12, 12))) + 2 * np.eye(12)
        params = {"mean": rng.normal(size=12), "factor": factor}
        return samplers.Gaussian(SIZES), params, params["mean"], factor @ factor.T
    prior = latents.make_prior(name, height=2, width=3, maps=2)
    params = random_prior_params(prior)
    mean, whitening = dense_prior(prior, params)
    return samplers.Prior(prior), params, mean, np.linalg.inv(whitening.T @ whitening)


def dense_conditional(mean, covariance, unknown, z):
    """Mean and covariance of the unknown entries, from blocks of the precision."""
    u, precision = np.repeat(unknown.ravel(), SIZES[2]), np.linalg.inv(covariance)
    spread = np.linalg.inv(precision[np.ix_(u, u)])
    pull = precision[np.ix_(u, ~u)] @ (z.ravel() - mean)[~u]
    return mean[u] - spread @ pull, spread


@pytest.mark.parametrize("name", ["gaussian", "tensor_normal", "matrix_normal", "autoregressive"])
@pytest.mark.parametrize("unknown", [UNKNOWN, np.ones((2, 3), bool)], ids=["some", "all"])
def test_moments_are_those_of_a_dense_gaussian(name, unknown, x64):
    sampler, params, mean, covariance = sampler_and_moments(name)
    found = condition(sampler.factors(params), unknown)
    z = np.random.default_rng(2).normal(size=SIZES)
    expected, spread = dense_conditional(mean, covariance, unknown, z)
    np.testing.assert_allclose(found.expected(z)[unknown].ravel(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.expected(z)[~unknown], z[~unknown].astype(np.float32))
    root = np.kron(found.lower, found.second)
    np.testing.assert_allclose(root @ root.T, spread, rtol=1e-8, atol=1e-10)

    count = 20_000
    drawn = found.sample(jax.random.key(0), z, count)
    np.testing.assert_array_equal(drawn[5, ~unknown], z[~unknown].astype(np.float32))
    flat = drawn[:, unknown].reshape(count, -1).astype(np.float64)
    variances = np.diag(spread)
    assert np.max(np.abs(flat.mean(0) - expected) / np.sqrt(variances / count)) < 5
    noise = np.sqrt((np.outer(variances, variances) + spread**2) / count)  # Wishart
    assert np.max(np.abs(np.cov(flat.T) - spread) / noise) < 5


def test_a_draw_does_not_depend_on_how_many_there_are(x64):
    sampler, params, *_ = sampler_and_moments("tensor_normal")
    found = condition(sampler.factors(params), UNKNOWN)
    z = np.zeros(SIZES)
    many = found.sample(jax.random.key(1), z, 9)
    np.testing.assert_array_equal(found.sample(jax.random.key(1), z, 4), many[:4])
    assert len(np.unique(many, axis=0)) == 9


def test_nothing_unknown_changes_nothing():
    factors = Factors(np.zeros(SIZES), np.eye(6), np.eye(2))
    found = condition(factors, np.zeros((2, 3), bool))
    z = np.random.default_rng(0).normal(size=SIZES).astype(np.float32)
    np.testing.assert_array_equal(found.expected(z), z)
    np.testing.assert_array_equal(found.sample(jax.random.key(0), z, 3), np.stack([z] * 3))


def test_the_temperature_scales_the_priors_deviations(x64):
    sampler, params, _, covariance = sampler_and_moments("matrix_normal")
    cool = samplers.Prior(sampler.prior, 0.5).factors(params)
    np.testing.assert_allclose(np.kron(cool.first, cool.second), 0.25 * covariance, rtol=1e-6)


def test_samplers_that_are_no_gaussians_have_no_factors():
    assert isinstance(samplers.Gaussian(SIZES), HasFactors)
    assert not isinstance(samplers.Mixture(SIZES), HasFactors)
    standard = latents.make_prior("standard", height=2, width=3, maps=2)
    with pytest.raises(ValueError, match="'standard' has no covariance in closed form"):
        samplers.Prior(standard).factors({})
