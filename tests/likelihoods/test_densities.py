"""Densities, optimal scales, samples and gradients, against SciPy and differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.test_util import check_grads

from svae_jax import likelihoods
from svae_jax.pixels import PixelRange
from tests.likelihoods import oracles
from tests.likelihoods.oracles import DENSITIES, every_likelihood

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_log_prob_equals_scipy(x64, name, channels):
    likelihood = oracles.make(name, (4, 2, channels))
    scale = oracles.random_scale(likelihood)
    images, outputs = oracles.random_images(likelihood, 5)
    expected = oracles.log_density(name, likelihood, scale, images, outputs)
    arrays = map(jnp.asarray, (scale, images, outputs))
    np.testing.assert_allclose(likelihood.log_prob(*arrays), expected, rtol=1e-12)


def test_log_prob_of_bernoulli_equals_scipy(x64):
    likelihood = oracles.make("bernoulli")
    images, logits = oracles.random_images(likelihood, 5)
    expected = scipy.stats.bernoulli.logpmf((images + 1) / 2, scipy.special.expit(logits))
    actual = likelihood.log_prob(jnp.ones(()), jnp.asarray(images), jnp.asarray(logits))
    np.testing.assert_allclose(actual, expected.sum((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(
        likelihood.mean(jnp.asarray(logits)), 2 * scipy.special.expit(logits) - 1, rtol=1e-12
    )


@every_likelihood
def test_any_batch_axes(name):
    likelihood = oracles.make(name)
    scale = jnp.asarray(oracles.random_scale(likelihood), jnp.float32)
    images, outputs = (jnp.asarray(x, jnp.float32) for x in oracles.random_images(likelihood, 2, 3))
    for function in (likelihood.log_prob, likelihood.log_mass):
        one = function(scale, images[1, 2], outputs[1, 2])
        assert one.shape == ()
        np.testing.assert_allclose(function(scale, images, outputs)[1, 2], one, rtol=1e-5)
    assert likelihood.sample(KEY, scale, outputs).shape == images.shape
    assert likelihood.sample(KEY, scale, outputs[1, 2]).shape == likelihood.image_shape


@every_likelihood
def test_mean_log_prob_is_the_mean_of_log_prob(x64, name):
    likelihood = oracles.make(name)
    scale = oracles.random_scale(likelihood)
    arrays = [jnp.asarray(x) for x in (scale, *oracles.random_images(likelihood, 5))]
    np.testing.assert_allclose(
        likelihood.mean_log_prob(*arrays), np.mean(likelihood.log_prob(*arrays)), rtol=1e-12
    )


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_one(x64, name):
    shape = {"gaussian_channels": (1, 1, 2), "gaussian_blocks": (2, 2, 1)}.get(name, (1, 1, 1))
    likelihood = oracles.make(name, shape)
    dims = math.prod(shape)
    # The trapezoidal rule converges exponentially for Gaussians; the Laplace density has a kink.
    step, end = (0.001, 20) if name == "laplace" else (0.4, 4.4)
    points = np.arange(-end, end + step / 2, step)
    grid = np.stack(np.meshgrid(*[points] * dims, indexing="ij"), -1).reshape(-1, *shape)
    scale = jnp.asarray(oracles.random_scale(likelihood, 0.4, 0.7))
    log_prob = likelihood.log_prob(scale, jnp.asarray(grid), jnp.zeros_like(grid))
    np.testing.assert_allclose(np.sum(np.exp(log_prob)) * step**dims, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", DENSITIES)
def test_no_other_scale_beats_the_optimal_one(x64, name):
    likelihood = oracles.make(name)
    images, outputs = map(jnp.asarray, oracles.random_images(likelihood, 6))
    error = likelihood.error(images, outputs)
    assert error.shape == (6, *likelihood.scale_shape)
    best = likelihood.optimal_scale(jnp.mean(error, axis=0))
    assert best.shape == likelihood.scale_shape
    highest = likelihood.mean_log_prob(best, images, outputs)
    for index in np.ndindex(best.shape):
        for factor in (0.9, 0.99, 1.01, 1.1):
            other = best.at[index].multiply(factor)
            assert likelihood.mean_log_prob(other, images, outputs) < highest


def test_the_optimal_scales_in_closed_form(x64):
    for name, power in (("gaussian", 2), ("laplace", 1)):
        likelihood = oracles.make(name)
        images, outputs = map(jnp.asarray, oracles.random_images(likelihood, 6))
        mean_error = jnp.mean(likelihood.error(images, outputs))
        expected = np.mean(np.abs(images - outputs) ** power) ** (1 / power)
        np.testing.assert_allclose(likelihood.optimal_scale(mean_error), expected, rtol=1e-12)


@pytest.mark.parametrize("name", DENSITIES)
def test_an_exact_reconstruction_has_a_finite_likelihood_and_gradient(name):
    likelihood = oracles.make(name, sigma="optimal")
    images = jnp.asarray(oracles.random_images(likelihood, 6)[0], jnp.float32)

    def loss(outputs):
        scale = likelihood.training_scale(images, outputs, None)
        return likelihood.mean_log_prob(scale, images, outputs)

    assert np.all(likelihood.training_scale(images, images, None) > 0.99 * likelihood.min_sigma)
    value, gradient = jax.value_and_grad(loss)(images)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", DENSITIES)
def test_the_gradient_through_an_optimal_scale_is_that_of_the_maximised_likelihood(x64, name):
    """The scale is held constant: its own slope is zero at the maximum."""
    likelihood = oracles.make(name, sigma="optimal")
    images, outputs = map(jnp.asarray, oracles.random_images(likelihood, 6))

    def training(outputs):
        scale = likelihood.training_scale(images, outputs, None)
        return likelihood.mean_log_prob(scale, images, outputs)

    def maximised(outputs):
        scale = likelihood.optimal_scale(jnp.mean(likelihood.error(images, outputs), axis=0))
        return likelihood.mean_log_prob(scale, images, outputs)

    np.testing.assert_allclose(training(outputs), maximised(outputs), rtol=1e-12)
    np.testing.assert_allclose(
        jax.grad(training)(outputs), jax.grad(maximised)(outputs), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ["gaussian_channels", "gaussian_blocks"])
@pytest.mark.parametrize("pixels", [oracles.FOUR_LEVELS, oracles.BITS16])
def test_equal_scales_are_a_gaussian_of_one(x64, name, pixels):
    likelihood = oracles.make(name, pixels=pixels)
    gaussian = oracles.make("gaussian", pixels=pixels)
    images, outputs = map(jnp.asarray, oracles.random_images(likelihood, 5))
    one, several = jnp.asarray(0.3), jnp.full(likelihood.scale_shape, 0.3)
    for method in ("log_prob", "mean_log_prob", "log_mass"):
        np.testing.assert_allclose(
            getattr(likelihood, method)(several, images, outputs),
            getattr(gaussian, method)(one, images, outputs),
            rtol=1e-11,
        )
    np.testing.assert_allclose(
        np.sum(likelihood.error(images, outputs), axis=-1),
        gaussian.error(images, outputs),
        rtol=1e-12,
    )


def test_channels_without_a_basis_are_the_channels(x64):
    likelihood = oracles.make("gaussian_channels", channel_basis=None)
    scale = oracles.random_scale(likelihood)
    images, outputs = oracles.random_images(likelihood, 5)
    arrays = [jnp.asarray(x) for x in (scale, images, outputs)]
    expected = scipy.stats.norm.logpdf(images, outputs, scale).sum((1, 2, 3))
    np.testing.assert_allclose(likelihood.log_prob(*arrays), expected, rtol=1e-12)
    half_bin = likelihood.pixels.half_bin
    expected = oracles.log_bin_mass(scipy.stats.norm, images, outputs, scale, half_bin)
    np.testing.assert_allclose(likelihood.log_mass(*arrays), expected.sum((1, 2, 3)), rtol=1e-10)


# Samples.

ENTROPIES = {  # of a value with scale s, less log s
    "gaussian": 0.5 * math.log(2 * math.pi * math.e),
    "gaussian_channels": 0.5 * math.log(2 * math.pi * math.e),
    "gaussian_blocks": 0.5 * math.log(2 * math.pi * math.e),
    "laplace": 1 + math.log(2),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_have_the_mean_and_the_entropy_of_the_density(x64, name):
    likelihood = oracles.make(name)
    count, dims = 4000, math.prod(likelihood.image_shape)
    scale = oracles.random_scale(likelihood)
    outputs = oracles.random_images(likelihood, 1)[1]
    copies = jnp.repeat(jnp.asarray(outputs), count, axis=0)
    samples = likelihood.sample(KEY, jnp.asarray(scale), copies)
    assert samples.dtype == copies.dtype
    _assert_near(samples - copies, 0)
    log_prob = likelihood.log_prob(jnp.asarray(scale), samples, copies)
    _assert_near(log_prob, -dims * (ENTROPIES[name] + np.mean(np.log(scale))))


@pytest.mark.parametrize("name", ["gaussian_channels", "gaussian_blocks"])
def test_samples_have_the_covariance(x64, name):
    likelihood = oracles.make(name)
    scale = oracles.random_scale(likelihood)
    outputs = jnp.zeros((4000, *likelihood.image_shape))
    samples = np.asarray(likelihood.sample(KEY, jnp.asarray(scale), outputs))
    values = oracles.blocks(likelihood, samples)
    products = values[..., :, None] * values[..., None, :]
    _assert_near(products, oracles.covariance(likelihood, scale))
    _assert_near(values[:, 0, :, None] * values[:, 1, None, :], 0)  # blocks are independent


@pytest.mark.parametrize("name", ["discretized_logistic", "bernoulli"])
def test_samples_have_the_masses_of_the_levels(x64, name):
    pixels = {"bernoulli": oracles.BINARY}.get(name, oracles.FOUR_LEVELS)
    likelihood = oracles.make(name, (1, 1, 1), pixels)
    levels = pixels.to_float(np.arange(pixels.num_levels)).reshape(-1, 1, 1, 1)
    levels = levels.astype(jnp.float64)
    outputs, scale = jnp.full((1, 1, 1), 0.4), jnp.asarray(0.3)
    samples = likelihood.sample(KEY, scale, jnp.broadcast_to(outputs, (4000, 1, 1, 1)))
    masses = jnp.exp(likelihood.log_mass(scale, levels, jnp.full_like(levels, 0.4)))
    np.testing.assert_allclose(np.sum(masses), 1, rtol=1e-6)  # the levels are of float32
    is_level = samples[:, None] == levels
    assert np.all(np.any(is_level, axis=1))
    _assert_near(is_level[..., 0, 0, 0], masses)


def test_logistic_samples_are_pixels_as_the_data_hold_them():
    for pixels in (PixelRange("uint8", 10.0, 15.0), oracles.BITS12, oracles.BITS16):
        likelihood = oracles.make("discretized_logistic", (8, 8, 3), pixels)
        samples = likelihood.sample(KEY, jnp.asarray(0.5), jnp.zeros((4, 8, 8, 3)))
        assert samples.dtype == jnp.float32
        np.testing.assert_array_equal(pixels.to_float(pixels.from_float(samples)), samples)
        assert np.min(samples) == -1
        assert np.max(samples) == 1


def _assert_near(samples, expected):
    """The mean over the first axis is within 4.5 standard errors."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - expected) < 4.5 * error)


# Gradients and extremes.


@every_likelihood
@pytest.mark.parametrize("method", ["log_prob", "log_mass"])
def test_gradients_equal_differences(x64, name, method):
    pixels = oracles.BINARY if name == "bernoulli" else oracles.FOUR_LEVELS
    likelihood = oracles.make(name, (2, 2, 2), pixels)
    images, outputs = map(jnp.asarray, oracles.random_images(likelihood, 3))
    log_scale = jnp.log(jnp.asarray(oracles.random_scale(likelihood)))

    @jax.jit
    def total(log_scale, outputs):
        return jnp.sum(getattr(likelihood, method)(jnp.exp(log_scale), images, outputs))

    check_grads(total, (log_scale, outputs), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@every_likelihood
@pytest.mark.parametrize("pixels", ["uint8", "uint16"])
@pytest.mark.parametrize("method", ["log_prob", "log_mass"])
def test_values_and_gradients_are_finite_at_extremes(name, pixels, method):
    pixels = {"uint8": None, "uint16": oracles.BITS16}[pixels] if name != "bernoulli" else None
    likelihood = oracles.make(name, (2, 2, 2), pixels)
    ends = jnp.linspace(-1, 1, 5)  # of images and outputs, all pairs
    images, outputs = (jnp.repeat(x.reshape(-1, 1), 8, 1) for x in jnp.meshgrid(ends, ends))
    images, outputs = (x.reshape(-1, 2, 2, 2) for x in (images, outputs))
    if name == "bernoulli":
        images, outputs = jnp.sign(images + 0.1), 1e4 * outputs

    @jax.jit
    def value_and_gradients(scale, outputs):
        def total(scale, outputs):
            return jnp.sum(getattr(likelihood, method)(scale, images, outputs))

        return jax.value_and_grad(total, argnums=(0, 1))(scale, outputs)

    for sigma in (0.1 * likelihood.min_sigma, likelihood.min_sigma, 0.01, 1.0, 1e4):
        scale = jnp.full(likelihood.scale_shape, sigma)
        # The gradient of the sum is finite only if that of every term is.
        value, gradients = value_and_gradients(scale, outputs)
        for array in (value, *gradients):
            assert np.all(np.isfinite(array))


# The basis of the channels.


def test_channel_basis_diagonalises_the_covariance_of_the_channels():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(20, 4, 3, 3)) @ rng.normal(size=(3, 3)) + 7
    basis = likelihoods.channel_basis(images)
    rows = np.array(basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-12)
    covariance = rows @ np.cov(images.reshape(-1, 3).T) @ rows.T
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-10)
    assert np.all(np.diff(np.diag(covariance)) < 0)
    for row in basis:
        assert row[np.argmax(np.abs(row))] > 0
    likelihoods.make("gaussian_blocks", image_shape=(4, 2, 3), channel_basis=basis)


def test_channel_basis_of_integers():
    images = np.random.default_rng(0).integers(0, 65535, (10, 4, 3, 3), dtype=np.uint16)
    np.testing.assert_allclose(
        likelihoods.channel_basis(images), likelihoods.channel_basis(images / 65535), atol=1e-9
    )
    small = (images // 256).astype(np.uint8)
    np.testing.assert_allclose(
        likelihoods.channel_basis(small), likelihoods.channel_basis(small * 1.0), atol=1e-9
    )


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channel_basis_of_constant_channels(channels):
    images = np.zeros((5, 2, 2, channels), np.uint8)
    basis = likelihoods.channel_basis(images)
    np.testing.assert_allclose(np.array(basis) @ np.transpose(basis), np.eye(channels), atol=1e-12)
    images[..., -1] = np.arange(4).reshape(2, 2)
    basis = likelihoods.channel_basis(images)
    np.testing.assert_allclose(basis[0], np.eye(channels)[-1], atol=1e-12)
    np.testing.assert_allclose(np.array(basis) @ np.transpose(basis), np.eye(channels), atol=1e-12)
