"""Densities of samplers, against dense Gaussians of SciPy, and as priors in a bound."""

import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import matrix_normal, multivariate_normal

from svae_jax import latents, samplers
from svae_jax.samplers import aggregate
from tests.samplers.toys import of

SHAPE = (2, 3, 2)
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(3, 5, *SHAPE)).astype(np.float32)  # two batch axes


def posteriors(count=400):
    """Two clusters of means, correlated, and noise that differs from map to map."""
    h, w, n = SHAPE
    mixing = RNG.normal(size=(h * w * n, h * w * n))
    signs = RNG.choice([-2.0, 2.0], (count, 1))
    means = ((RNG.normal(size=(count, h * w * n)) + signs) @ mixing).astype(np.float32)
    roots = RNG.normal(size=(n, h * w, h * w))
    noise = (count * roots @ roots.swapaxes(1, 2)).astype(np.float32)
    given = of([aggregate.Encoded(means, noise)])
    return aggregate.Posteriors(given._encode, lambda: [means.reshape(-1, *SHAPE)])


def density(sampler, params):
    return np.asarray(jax.jit(sampler.log_prob)(sampler.density(params), Z), np.float64)


def test_the_gaussians_is_that_of_its_moments():
    given = posteriors()
    sampler = samplers.Gaussian(SHAPE)
    moments = given.moments
    expected = multivariate_normal(moments.mean, moments.covariance).logpdf(Z.reshape(3, 5, -1))
    np.testing.assert_allclose(density(sampler, sampler.fit(given)), expected, rtol=1e-5)


def test_the_kroneckers_is_that_of_the_matrix_normal():
    sampler = samplers.Kronecker(SHAPE)
    params = sampler.fit(posteriors())
    rows, cols, maps = (params[k].astype(np.float64) for k in ("rows", "cols", "maps"))
    h, w, n = SHAPE
    dense = matrix_normal(
        params["mean"].reshape(h * w, n), np.kron(rows @ rows.T, cols @ cols.T), maps @ maps.T
    )
    expected = dense.logpdf(Z.reshape(3, 5, h * w, n))
    np.testing.assert_allclose(density(sampler, params), expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("components", [1, 3])
def test_the_mixtures_is_a_dense_mixture_of_means_with_the_posteriors_noise(share, components):
    given = posteriors()
    sampler = samplers.Mixture(SHAPE, components=components, share=share)
    params = {k: v.astype(np.float64) for k, v in sampler.fit(given).items()}
    d, k = len(params["mean"]), params["centres"].shape[1]
    assert (k == d) == (share == 1.0)
    noise = aggregate.Moments(np.zeros(d), np.zeros((d, d)), given.moments.of_noise).covariance
    logs = []
    for weight, centre, factor in zip(
        params["log_weights"], params["centres"], params["factors"], strict=True
    ):
        inner = np.eye(d)
        inner[:k, :k] = factor @ factor.T
        covariance = params["basis"].T @ inner @ params["basis"] + noise
        mean = params["mean"] + centre @ params["basis"][:k]
        component = multivariate_normal(mean, covariance)
        logs.append(weight + component.logpdf(Z.reshape(3, 5, -1)))
    np.testing.assert_allclose(density(sampler, params), logsumexp(logs, axis=0), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_priors_is_the_priors_stretched(temperature):
    prior = latents.make_prior("tensor_normal", height=2, width=3, maps=2)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * RNG.normal(size=leaf.shape).astype(np.float32), prior.initial()
    )
    sampler = samplers.Prior(prior, temperature)
    first, second = prior.covariance_factors(params)
    covariance = temperature**2 * np.kron(np.asarray(first), np.asarray(second))
    mean = np.asarray(prior.mean(params)).ravel()
    expected = multivariate_normal(mean, covariance).logpdf(Z.reshape(3, 5, -1))
    np.testing.assert_allclose(density(sampler, params), expected, rtol=1e-5)


def test_a_cold_prior_has_none():
    prior = latents.make_prior("standard", height=2, width=3, maps=2)
    with pytest.raises(ValueError, match="temperature"):
        samplers.Prior(prior, 0.0).density({})


def test_all_but_the_flow_know_theirs():
    known = {name for name, kind in samplers.TABLE.items() if issubclass(kind, samplers.Density)}
    assert known == set(samplers.names()) - {"flow"}
