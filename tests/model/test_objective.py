"""The training loss and the bounds, against closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from svae_jax import latents, likelihoods
from svae_jax.model import objective
from svae_jax.model.objective import Objective

SHAPE = (2, 3, 1)  # of an image of the linear-Gaussian model
SIGMA = 0.4


def _images(key, *shape):
    return jax.random.uniform(jax.random.key(key), shape, minval=-1, maxval=1)


def test_bits_per_dim():
    # A uniform distribution over 256 levels needs 8 bits.
    assert objective.bits_per_dim(-10 * math.log(256), 10) == pytest.approx(8.0)


# The training loss.


def _loss(
    objective_, images, means, kl_per_map, *, sigma="optimal", step=0, num_latents=1, log_sigma=None
):
    return objective.training_loss(
        objective_,
        likelihoods.make("gaussian", image_shape=images.shape[1:], sigma=sigma),
        jnp.asarray(step),
        images,
        means,
        kl_per_map,
        num_latents=num_latents,
        log_sigma=log_sigma,
    )


def _batch():
    images, means = _images(0, 6, 4, 4, 3), _images(1, 6, 4, 4, 3)
    return images, means, jax.random.uniform(jax.random.key(2), (6, 5)) * 3


@pytest.mark.parametrize("sigma", ["0.7", "learned", "optimal"])
def test_the_loss_is_the_negative_elbo(x64, sigma):
    images, means, kl = _batch()
    rmse = np.sqrt(np.mean((images - means) ** 2))
    value = {"0.7": 0.7, "learned": 0.5, "optimal": rmse}[sigma]
    log_sigma = jnp.log(0.5) if sigma == "learned" else None
    actual = _loss(Objective(), images, means, kl, sigma=sigma, log_sigma=log_sigma)
    log_prob = scipy.stats.norm.logpdf(images, means, value).sum((1, 2, 3))
    np.testing.assert_allclose(actual.loss, np.mean(kl.sum(-1) - log_prob), rtol=1e-10)
    np.testing.assert_allclose(actual.reconstruction, np.mean(log_prob), rtol=1e-10)
    np.testing.assert_allclose(actual.kl, np.mean(kl.sum(-1)), rtol=1e-10)
    np.testing.assert_allclose(actual.sigma, value, rtol=1e-10)


def test_no_other_sigma_beats_the_optimal_one(x64):
    images, means, kl = _batch()
    best = _loss(Objective(), images, means, kl)
    for factor in (0.9, 0.99, 1.01, 1.1):
        other = _loss(Objective(), images, means, kl, sigma=str(float(best.sigma * factor)))
        assert other.loss > best.loss


def test_the_gradient_through_an_optimal_sigma_is_that_of_the_maximised_likelihood(x64):
    """σ is held constant in the loss: its own slope is zero at the maximum."""
    images, means, kl = _batch()

    def maximised(means):
        error = jnp.mean((images - means) ** 2)
        return 0.5 * images[0].size * jnp.log(error)

    expected = jax.grad(maximised)(means)
    actual = jax.grad(lambda means: _loss(Objective(), images, means, kl).loss)(means)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_an_exact_reconstruction_has_a_finite_loss_and_gradient():
    images, _, kl = _batch()
    value, gradient = jax.value_and_grad(lambda means: _loss(Objective(), images, means, kl).loss)(
        images
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_beta_and_its_warm_up(x64):
    images, means, kl = _batch()
    plain = _loss(Objective(), images, means, kl)
    half = _loss(Objective(beta=0.5), images, means, kl)
    np.testing.assert_allclose(half.loss, plain.loss - 0.5 * plain.kl, rtol=1e-10)
    warming = Objective(beta=2.0, beta_warmup_steps=10)
    weights = [
        float((_loss(warming, images, means, kl, step=s).loss + plain.reconstruction) / plain.kl)
        for s in (0, 4, 9, 50)
    ]
    np.testing.assert_allclose(weights, [0.2, 1.0, 2.0, 2.0], rtol=1e-10)


def test_free_bits_bound_the_batch_mean_of_each_map(x64):
    images, means, _ = _batch()
    kl = jnp.asarray([[0.1, 4.0], [0.3, 0.0]])  # means 0.2 and 2.0
    plain = _loss(Objective(), images[:2], means[:2], kl)
    free = _loss(Objective(free_bits=0.5), images[:2], means[:2], kl)
    np.testing.assert_allclose(free.loss - plain.loss, 0.3, rtol=1e-10)
    np.testing.assert_allclose(free.kl, plain.kl)
    gradient = jax.grad(lambda kl: _loss(Objective(free_bits=0.5), images[:2], means[:2], kl).loss)(
        kl
    )
    np.testing.assert_allclose(gradient, [[0, 0.5], [0, 0.5]], atol=1e-12)


@pytest.mark.parametrize("num_latents", [150, 1152])
def test_released_code_is_sse_plus_d_over_z_kl(x64, num_latents):
    images, means, kl = _batch()
    dims = images[0].size
    released = Objective(scaling="released_code")
    actual = _loss(released, images, means, kl, num_latents=num_latents)
    sse = np.mean(((images - means) ** 2).sum((1, 2, 3)))
    expected = (sse + dims / num_latents * np.mean(kl.sum(-1))) / dims
    np.testing.assert_allclose(actual.loss, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("dims", "latent", "weight", "sigma", "beta"),
    [
        (64 * 64 * 3, 81, 151.7, 8.7, 75.9),
        (64 * 64 * 3, 576, 21.3, 3.3, 10.7),
        (32 * 32 * 3, 150, 20.5, 3.2, 10.2),
        (32 * 32 * 3, 1152, 2.7, 1.15, 1.33),
    ],
)
def test_released_code_weighs_the_kl_by_the_latents_size(x64, dims, latent, weight, sigma, beta):
    """The slopes of its loss give the table of weights and of equivalent σ and β."""
    images = _images(0, 2, 1, dims, 1)
    means, kl = _images(1, 2, 1, dims, 1), jnp.ones((2, 1))
    of_means, of_kl = jax.grad(
        lambda means, kl: (
            _loss(Objective(scaling="released_code"), images, means, kl, num_latents=latent).loss
        ),
        argnums=(0, 1),
    )(means, kl)
    of_sse = of_means[0, 0, 0, 0] / (2 * (means - images)[0, 0, 0, 0])
    assert float(of_kl[0, 0] / of_sse) == pytest.approx(weight, rel=0.015)
    # σ = 1 with the table's β, and the table's σ with β = 1, have the same ratio of slopes.
    for same, own in ((Objective(beta=beta), "1.0"), (Objective(), str(sigma))):
        slopes = jax.grad(
            lambda means, kl, same=same, own=own: _loss(same, images, means, kl, sigma=own).loss,
            argnums=(0, 1),
        )(means, kl)
        ratio = slopes[1][0, 0] / (slopes[0][0, 0, 0, 0] / (2 * (means - images)[0, 0, 0, 0]))
        assert float(ratio) == pytest.approx(weight, rel=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": math.nan}, "beta must be .* nan"),
        ({"beta": -0.1}, "beta must be"),
        ({"free_bits": -1.0}, "free_bits must be"),
        ({"beta_warmup_steps": -1}, "beta_warmup_steps must be"),
        ({"scaling": "mean"}, "scaling must be one of elbo, released_code, got 'mean'"),
        ({"scaling": "released_code", "beta": 2.0}, "beta=2.0 cannot be combined"),
        ({"scaling": "released_code", "free_bits": 0.1}, "free_bits=0.1 cannot be combined"),
        ({"scaling": "released_code", "beta_warmup_steps": 3}, "cannot be combined"),
    ],
)
def test_bad_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(**fields)


# Bounds, on a linear-Gaussian model x = Wz + b + σε, whose log-likelihood is known.


def _linear_gaussian(orthogonal=True):
    """W [6, 4] with WᵀW diagonal (or not), b, and 20 images drawn from the model."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((6, 4)))
    w = q * np.array([0.3, 0.7, 1.0, 1.5])
    if not orthogonal:
        w = w + 0.4 * rng.standard_normal((6, 4))
    b = 0.1 * rng.standard_normal(6)
    x = rng.standard_normal((20, 4)) @ w.T + b + SIGMA * rng.standard_normal((20, 6))
    return w, b, x


def _log_prior(posterior):
    prior = latents.make_prior(
        "standard", height=posterior.height, width=posterior.width, maps=posterior.maps
    )
    return functools.partial(prior.log_prob, {})


def _log_weights(w, b, x, posterior, params, num_samples, chunk_size=7):
    def log_likelihood(z):
        means = (z.reshape(len(x), 4) @ w.T + b).reshape(len(x), *SHAPE)
        gaussian = likelihoods.make("gaussian", image_shape=SHAPE)
        return gaussian.log_prob(jnp.asarray(SIGMA), jnp.asarray(x).reshape(-1, *SHAPE), means)

    return objective.log_importance_weights(
        jax.random.key(0),
        posterior,
        params,
        log_likelihood,
        _log_prior(posterior),
        num_samples=num_samples,
        chunk_size=chunk_size,
    )


def _exact(w, b, x):
    covariance = w @ w.T + SIGMA**2 * np.eye(6)
    return scipy.stats.multivariate_normal(b, covariance).logpdf(x)


def _exact_posterior(w, b, x):
    """The true posterior's mean [20, 4] and covariance [4, 4]."""
    covariance = np.linalg.inv(np.eye(4) + w.T @ w / SIGMA**2)
    return (x - b) @ w @ covariance / SIGMA**2, covariance


def _naive(mean, log_variance):
    posterior = latents.make("naive", height=1, width=2, maps=2)
    flat = np.concatenate([mean, np.broadcast_to(log_variance, mean.shape)], axis=1)
    return posterior, posterior.unpack(jnp.asarray(flat))


@pytest.mark.parametrize("num_samples", [1, 2, 10])
def test_with_the_exact_posterior_any_k_gives_the_log_likelihood(x64, num_samples):
    w, b, x = _linear_gaussian()
    mean, covariance = _exact_posterior(w, b, x)
    posterior, params = _naive(mean, np.log(np.diag(covariance)))
    weights = _log_weights(w, b, x, posterior, params, num_samples)
    bound = objective.importance_weighted_bound(weights)
    np.testing.assert_allclose(bound, _exact(w, b, x), rtol=1e-10)


def test_otherwise_the_bound_rises_with_k_and_stays_below_the_log_likelihood(x64):
    w, b, x = _linear_gaussian(orthogonal=False)
    mean, covariance = _exact_posterior(w, b, x)
    posterior, params = _naive(mean + 0.1, np.log(np.diag(covariance)) + 0.3)
    weights = _log_weights(w, b, x, posterior, params, 4096, chunk_size=512)
    exact, last = _exact(w, b, x), -np.inf
    for k in (1, 4, 16, 64, 256):
        # Nested groups of the same samples: the mean over groups of the bound of each.
        bounds = jax.vmap(objective.importance_weighted_bound)(weights.reshape(-1, k, len(x)))
        per_group = np.mean(np.asarray(bounds) - exact, axis=1)
        mean_gap = per_group.mean()
        error = per_group.std(ddof=1) / math.sqrt(len(per_group))
        assert last < mean_gap < 3 * error
        last = mean_gap
    assert last > -0.03
    elbo = np.mean(weights, axis=0)  # the mean of the log-weights is the ELBO
    analytic = _analytic_elbo(w, b, x, mean + 0.1, np.exp(np.log(np.diag(covariance)) + 0.3))
    error = np.std(weights, axis=0, ddof=1) / math.sqrt(len(weights))
    assert np.all(np.abs(elbo - analytic) < 4 * error)


def _analytic_elbo(w, b, x, mean, variance):
    """E_q[log p(x|z)] − KL in closed form, for q = N(mean, diag(variance))."""
    residual = ((x - b - mean @ w.T) ** 2).sum(1) + np.sum((w**2) @ variance)
    reconstruction = -0.5 * residual / SIGMA**2 - 3 * math.log(2 * math.pi * SIGMA**2)
    kl = 0.5 * (np.sum(variance - 1 - np.log(variance)) + (mean**2).sum(1))
    return reconstruction - kl


def test_the_samples_do_not_depend_on_the_chunks(x64):
    w, b, x = _linear_gaussian()
    posterior, params = _naive(np.zeros((20, 4)), np.zeros(4))
    chunks = [_log_weights(w, b, x, posterior, params, 10, chunk_size=c) for c in (1, 3, 10)]
    np.testing.assert_allclose(chunks[0], chunks[1], rtol=1e-12)
    np.testing.assert_allclose(chunks[0], chunks[2], rtol=1e-12)


def test_a_thousand_samples_are_not_decoded_at_once():
    """The compiled bound's memory hardly grows with K."""
    posterior = latents.make("naive", height=4, width=4, maps=16)
    params = posterior.unpack(jnp.zeros((8, posterior.num_params)))
    images = jnp.zeros((8, 32, 32, 3))
    gaussian = likelihoods.make("gaussian", image_shape=(32, 32, 3))

    def decode(z):
        return jnp.tile(jnp.mean(z, axis=-1)[..., None], (1, 8, 8, 3))

    def memory(num_samples):
        def bound(key):
            weights = objective.log_importance_weights(
                key,
                posterior,
                params,
                lambda z: gaussian.log_prob(jnp.ones(()), images, decode(z)),
                _log_prior(posterior),
                num_samples=num_samples,
                chunk_size=10,
            )
            return objective.importance_weighted_bound(weights)

        compiled = jax.jit(bound).lower(jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(1000) < 1.2 * memory(20)
