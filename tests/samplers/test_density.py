"""Densities of samplers, against dense Gaussians of SciPy, and as priors in a bound."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import matrix_normal, multivariate_normal

from svae_jax import latents, samplers
from svae_jax.samplers import aggregate, flow, velocity
from tests.samplers.toys import of

SHAPE = (2, 3, 2)
SMALL = {
    "width": 32, "depth": 1, "num_params": 15_000, "batch_size": 256, "learning_rate": 3e-3,
    "ema_decay": 0.99, "num_steps": 400,
}  # fmt: skip
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


def test_an_untrained_flow_of_latents_has_the_gaussians():
    """Its velocity is linear, so that its divergence has no noise."""
    given = posteriors()
    sampler = samplers.LatentFlow(SHAPE, **SMALL, density_steps=20)
    params = sampler.params(sampler.init(given))
    z = np.concatenate([z.reshape(len(z), -1) for z in given._sample()])
    np.testing.assert_allclose(params["mean"], given.moments.mean, rtol=1e-6)
    expected = multivariate_normal(params["mean"], given.moments.covariance)
    np.testing.assert_allclose(
        density(sampler, params), expected.logpdf(Z.reshape(3, 5, -1)), rtol=1e-3
    )
    assert z.shape == (400, 12)


def test_a_flow_of_latents_knows_the_density_of_what_it_draws(monkeypatch):
    """Against the determinant of the map from noise to a sample, by automatic differentiation."""
    rng = np.random.default_rng(1)
    signs = rng.choice([-2.0, 2.0], (500, 1, 1, 1))
    z = (signs + rng.normal(size=(500, 1, 1, 3)) * [1.0, 0.5, 2.0]).astype(np.float32)
    given = aggregate.Posteriors(
        of([aggregate.Encoded(z.reshape(500, 3), np.full((3, 1, 1), 1e-3, np.float32))])._encode,
        lambda: [z],
    )
    sampler = samplers.LatentFlow((1, 1, 3), **SMALL, ode_steps=80, density_steps=80)
    params = samplers.fit(sampler, given)

    def draw(white):
        source = velocity.to_patches((params["factor"] @ white)[None], (1, 1, 3))
        network = params["network"]
        x = flow.heun(lambda x, t: sampler._velocity(network, x, jnp.full(1, t)), source, 80)
        return params["mean"] + params["scale"] * x.reshape(3)

    white = rng.normal(size=(300, 3)).astype(np.float32)
    drawn = jax.jit(jax.vmap(draw))(white)
    _, log_det = np.linalg.slogdet(np.asarray(jax.jit(jax.vmap(jax.jacobian(draw)))(white)))
    expected = multivariate_normal(np.zeros(3)).logpdf(white) - log_det
    arrays, z = sampler.density(params), drawn.reshape(-1, 1, 1, 3)
    found = jax.jit(sampler.log_prob)(arrays, z)
    assert np.std(log_det) > 0.2  # the flow has learned something that is not linear
    errors = np.asarray(found) - expected
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(len(errors))
    # A function of z alone, whatever stands beside it.
    alone = sampler.log_prob(arrays, z[7])
    np.testing.assert_allclose(alone, found[7], rtol=1e-3)
    # The mean over all signs is the trace itself.
    total = np.zeros(len(z))
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        monkeypatch.setattr(jax.random, "rademacher", lambda *_, s=signs: jnp.array([s]))
        total += jax.jit(lambda z: sampler.log_prob(arrays, z))(z)
    np.testing.assert_allclose(total / 8, expected, atol=0.03)


def test_all_but_the_flow_of_means_know_theirs():
    known = {name for name, kind in samplers.TABLE.items() if hasattr(kind, "log_prob")}
    assert known == set(samplers.names()) - {"flow"}
