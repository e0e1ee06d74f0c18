"""Probability masses of integers: they equal differences of SciPy's CDFs, and sum to one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from svae_jax import likelihoods
from svae_jax.pixels import PixelRange
from tests.likelihoods import oracles
from tests.likelihoods.oracles import DISTRIBUTIONS

pytestmark = pytest.mark.usefixtures("optimised")  # rounding as it is in use

RANGES = [PixelRange(), oracles.BITS12, oracles.BITS16]
ranges = pytest.mark.parametrize("pixels", RANGES, ids=["8 bits", "12 bits", "16 bits"])
families = pytest.mark.parametrize("name", DISTRIBUTIONS)
MIN_SIGMA = math.exp(-6.0)


def _levels(pixels, dtype=np.float64):
    levels = (np.arange(pixels.num_levels) * 2.0 - (pixels.num_levels - 1)) * pixels.half_bin
    return levels.astype(dtype).reshape(-1, 1, 1, 1)


def _log_masses(name, pixels, mean, sigma, dtype):
    """log P of each level."""
    likelihood = oracles.make(name, (1, 1, 1), pixels)
    levels = jnp.asarray(_levels(pixels, dtype))
    scale = jnp.asarray(sigma, dtype)
    return likelihood.log_mass(scale, levels, jnp.full_like(levels, mean))


@families
@given(mean=st.floats(-1, 1), log_sigma=st.floats(math.log(MIN_SIGMA), math.log(10.0)))
@settings(max_examples=30, deadline=None)
def test_masses_sum_to_one(name, mean, log_sigma):
    with jax.enable_x64(True):
        log_mass = _log_masses(name, PixelRange(), mean, math.exp(log_sigma), np.float64)
        assert not np.any(np.isnan(log_mass))
        np.testing.assert_allclose(np.sum(np.exp(log_mass)), 1.0, rtol=1e-10)


@families
@ranges
@pytest.mark.parametrize("sigma", [0.7, 3.0, 30.0, 1e4])  # in half bins
def test_masses_sum_to_one_in_float32(name, pixels, sigma):
    log_mass = _log_masses(name, pixels, 0.1, sigma * pixels.half_bin, np.float32)
    # Neighbours in 16 bits stand 2⁻¹⁵ apart, and are rounded to 2⁻²⁴.
    total = np.sum(np.exp(np.asarray(log_mass, np.float64)))
    np.testing.assert_allclose(total, 1.0, rtol=2e-3 if pixels == oracles.BITS16 else 1e-4)


@families
@ranges
@pytest.mark.parametrize("sigma", [0.003, 0.05, 0.3, 3.0])
def test_masses_equal_differences_of_scipys_cdf(name, pixels, sigma):
    """In float32, as evaluation computes them."""
    mean = np.float32(0.1)
    levels = _levels(pixels, np.float32)
    expected = oracles.log_bin_mass(
        DISTRIBUTIONS[name],
        levels.astype(np.float64),
        np.float64(mean),
        np.float64(np.float32(sigma)),
        pixels.half_bin,
    )[:, 0, 0, 0]
    actual = _log_masses(name, pixels, mean, sigma, np.float32)
    sure = expected > math.log(1e-290)  # below that, SciPy's difference is rounding or zero
    np.testing.assert_allclose(actual[sure], expected[sure], rtol=2e-4, atol=2e-4)
    assert np.all(np.isfinite(actual))


@families
@ranges
@pytest.mark.parametrize("sigma", [0.003, 0.3, 30.0])
def test_masses_equal_differences_of_scipys_cdf_in_float64(x64, name, pixels, sigma):
    half_bin = pixels.half_bin
    levels = _levels(pixels)
    expected = oracles.log_bin_mass(DISTRIBUTIONS[name], levels, 0.1, sigma, half_bin)[:, 0, 0, 0]
    actual = _log_masses(name, pixels, 0.1, sigma, np.float64)
    sure = expected > math.log(1e-290)
    np.testing.assert_allclose(actual[sure], expected[sure], rtol=1e-8, atol=1e-8)


@families
def test_masses_have_the_gradients_of_finite_differences(x64, name):
    """In the mean and in σ, at black and white pixels too."""
    images = jnp.asarray([-1.0, -0.2 + 1 / 255, 1.0]).reshape(3, 1, 1, 1)
    likelihood = oracles.make(name, (1, 1, 1))

    @jax.jit
    def total(mean, sigma):
        return jnp.sum(likelihood.log_mass(jnp.asarray(sigma), images, jnp.full_like(images, mean)))

    gradient = jax.grad(total, argnums=(0, 1))(0.1, 0.3)
    step = 1e-6
    expected = (
        (total(0.1 + step, 0.3) - total(0.1 - step, 0.3)) / (2 * step),
        (total(0.1, 0.3 + step) - total(0.1, 0.3 - step)) / (2 * step),
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_gradient_is_continuous_where_the_bin_becomes_narrow():
    """The Gaussian's two expressions meet at a δ of about 0.04 in float32."""
    images = jnp.full((1, 1, 1), 1 / 255)
    likelihood = oracles.make("gaussian", (1, 1, 1))
    gradient = jax.grad(lambda scale: likelihood.log_mass(scale, images, 0 * images))
    gradient = jax.jit(jax.vmap(gradient))
    delta = np.linspace(0.03, 0.05, 21)
    scale = jnp.asarray(likelihood.pixels.half_bin / delta, jnp.float32)
    # d log P/dσ = (d² − 1)/σ + …; here d = δ.
    np.testing.assert_allclose(gradient(scale) * scale, -1, atol=5e-3)


# Several σ, in the conditional form.


@pytest.mark.parametrize(
    ("name", "shape", "highest"),
    [
        ("gaussian_channels", (1, 1, 3), 5),
        ("gaussian_blocks", (2, 2, 1), 3),
        ("gaussian_blocks", (2, 2, 2), 1),
    ],
)
@given(
    seed=st.integers(0, 2**16),
    log_scale=st.floats(-4.0, 2.0),
    log_ratio=st.floats(0.0, 5.0),
)
@settings(max_examples=20, deadline=None)
def test_conditional_masses_sum_to_one(name, shape, highest, seed, log_scale, log_ratio):
    pixels = PixelRange("uint8", 0.0, float(highest))
    basis = oracles.random_basis(shape[2], seed)
    likelihood = oracles.make(name, shape, pixels, channel_basis=basis)
    rng = np.random.default_rng(seed)
    scale = np.exp(log_scale + log_ratio * rng.uniform(-1, 0, likelihood.scale_shape))
    levels = np.indices([highest + 1] * math.prod(shape)).reshape(math.prod(shape), -1).T
    images = (levels * 2 * pixels.half_bin - 1).reshape(-1, *shape)
    means = np.broadcast_to(rng.uniform(-1, 1, shape), images.shape)
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (scale, images, means))
        log_mass = likelihood.log_mass(*arrays)
        assert not np.any(np.isnan(log_mass))
        np.testing.assert_allclose(np.sum(np.exp(log_mass)), 1.0, rtol=1e-9)


@pytest.mark.parametrize("name", ["gaussian_channels", "gaussian_blocks"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@ranges
def test_conditional_masses_equal_those_of_conditional_normals(x64, name, dtype, pixels):
    likelihood = oracles.make(name, (2, 4, 3), pixels)
    scale = oracles.random_scale(likelihood, 0.02, 0.3).astype(dtype)
    images, outputs = (x.astype(dtype) for x in oracles.random_images(likelihood, 2))
    outputs = images + dtype(0.1) * outputs
    images[0, 0, 0], images[1, 1, 1] = -1, 1

    half_bin = pixels.half_bin
    covariance = oracles.covariance(likelihood, scale.astype(np.float64))
    x = oracles.blocks(likelihood, images.astype(np.float64))
    error = x - oracles.blocks(likelihood, outputs.astype(np.float64))
    expected = 0
    for i in range(len(covariance)):
        weights = np.linalg.solve(covariance[:i, :i], covariance[:i, i])
        mean = x[..., i] - error[..., i] + error[..., :i] @ weights
        sd = np.sqrt(covariance[i, i] - covariance[i, :i] @ weights)
        expected += oracles.log_bin_mass(scipy.stats.norm, x[..., i], mean, sd, half_bin).sum(1)

    actual = likelihood.log_mass(*map(jnp.asarray, (scale, images, outputs)))
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=2e-5 if dtype == np.float32 else 1e-8)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_channels", "gaussian_blocks", "laplace"])
def test_the_masses_of_narrow_bins_are_density_times_width(x64, name):
    likelihood = oracles.make(name, pixels=oracles.BITS16)
    images, outputs = oracles.random_images(likelihood, 5)
    images = np.clip(images, -0.99, 0.99)
    scale = oracles.random_scale(likelihood)
    arrays = [jnp.asarray(x) for x in (scale, images, outputs)]
    dims = math.prod(likelihood.image_shape)
    expected = likelihood.log_prob(*arrays) + dims * math.log(2 / 65535)
    np.testing.assert_allclose(likelihood.log_mass(*arrays), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["discretized_logistic", "bernoulli"])
def test_the_log_prob_of_discrete_likelihoods_is_the_mass(name):
    likelihood = oracles.make(name)
    arrays = [
        jnp.asarray(x, jnp.float32)
        for x in (oracles.random_scale(likelihood), *oracles.random_images(likelihood, 5))
    ]
    np.testing.assert_array_equal(likelihood.log_mass(*arrays), likelihood.log_prob(*arrays))


@pytest.mark.parametrize("name", ["gaussian", "laplace", "discretized_logistic"])
def test_masses_of_all_integers_sum_to_one_beyond_an_inferred_range(name, x64):
    """Held-out integers may lie beyond those of the training split."""
    pixels = PixelRange("uint16", 1000.0, 1100.0, True)
    likelihood = likelihoods.make(name, image_shape=(1, 1, 1), pixels=pixels, sigma="0.5")
    levels = np.arange(0, 65536)
    images = jnp.asarray((levels - 1050.0) / 50.0).reshape(-1, 1, 1, 1)
    mass = likelihood.log_mass(jnp.asarray(0.5), images, jnp.full_like(images, 0.8))
    np.testing.assert_allclose(np.exp(mass).sum(), 1, rtol=1e-6)
