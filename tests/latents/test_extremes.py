"""Log-variances from −30 to 20 in float32: all stays finite, and what can be exact is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.latents.oracles import POSTERIORS, one_of_each_name, random_params

pytestmark = pytest.mark.usefixtures("optimised")  # the arithmetic as it is in use

LOW, HIGH = -30.0, 20.0
DRAWS = 64
KEY = jax.random.key(0)


def with_log_variances(params, choose):
    """The parameters, with each array of log-variances replaced by ``choose(shape)``."""
    return {
        name: jnp.asarray(choose(leaf.shape), jnp.float32) if "log_variance" in name else leaf
        for name, leaf in params.items()
    }


def extremes(post):
    """Parameters ``[DRAWS, …]``: log-variances all low, all high, at either end, and between."""
    rng = np.random.default_rng(0)
    params = random_params(post, (DRAWS,), dtype=np.float32)

    def choose(shape):
        ends = rng.choice([LOW, HIGH], shape)
        between = rng.uniform(LOW, HIGH, shape)
        values = np.where(np.arange(DRAWS).reshape(-1, *[1] * (len(shape) - 1)) % 2, ends, between)
        values[0], values[1] = LOW, HIGH
        return values

    return with_log_variances(params, choose)


@one_of_each_name
def test_values_and_gradients_are_finite(post):
    @jax.jit
    def evaluate(params):
        def total(params):
            z, its_log_prob = post.sample_and_log_prob(KEY, params)
            values = {
                "z": z,
                "its_log_prob": its_log_prob,
                "log_prob": post.log_prob(params, jax.lax.stop_gradient(z)),
                "stddev": post.stddev(params),
                "kl": post.kl(params),
            }
            return sum(jnp.sum(value) for value in values.values()), values

        # The gradient of the sum is finite only if that of every term is.
        gradients, values = jax.grad(total, has_aux=True)(params)
        return values, gradients

    values, gradients = evaluate(extremes(post))
    for name, array in (values | gradients).items():
        assert np.all(np.isfinite(np.asarray(array))), name


@one_of_each_name
def test_stddevs_are_positive(post):
    assert np.all(np.asarray(post.stddev(extremes(post))) > 0)


@one_of_each_name
@pytest.mark.parametrize("end", [LOW, HIGH])
def test_whiten_undoes_colour_at_either_end(post, end):
    params = random_params(post, (4,), dtype=np.float32)
    params = with_log_variances(params, lambda shape: np.full(shape, end))
    shape = (4, post.height, post.width, post.maps)
    noise = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    model = post.covariance_model
    back = jax.jit(lambda params: model.whiten(params, model.colour(params, jnp.asarray(noise))))(
        params
    )
    np.testing.assert_allclose(back, noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["naive", "mvn", "mvn_full"])
def test_log_density_is_exact_where_the_deviation_is_below_the_means_rounding(name):
    """At σ = e⁻¹⁵ or less, 1000 + σε is 1000 in float32; the density of ε is not lost with it."""
    post = POSTERIORS[name]
    params = random_params(post, (4,), dtype=np.float32)
    params = with_log_variances(params, lambda shape: np.full(shape, LOW))
    at_zero = params | {"mean": jnp.zeros_like(params["mean"])}
    far = params | {"mean": jnp.full_like(params["mean"], 1000)}

    z, exact = post.sample_and_log_prob(KEY, at_zero)
    np.testing.assert_allclose(exact, post.log_prob(at_zero, z), rtol=1e-6)

    z, log_prob = post.sample_and_log_prob(KEY, far)
    np.testing.assert_array_equal(log_prob, exact)
    assert np.all(np.abs(np.asarray(post.log_prob(far, z) - exact)) > 1)


@pytest.mark.parametrize("end", [LOW, HIGH])
def test_kl_of_extremes_is_that_of_float64(end):
    post = POSTERIORS["mvn"]
    params = random_params(post, dtype=np.float32)
    params = with_log_variances(params, lambda shape: np.full(shape, end))
    squared_mean = np.sum(np.asarray(params["mean"], np.float64) ** 2)
    expected = 0.5 * (12 * np.exp(2 * end) + squared_mean - 12 - 12 * 2 * end)
    np.testing.assert_allclose(post.kl(params), expected, rtol=1e-5)
