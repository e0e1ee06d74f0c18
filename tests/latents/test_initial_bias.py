"""Where an encoder starts: at the prior, off the saddle of a product; and how fast ν moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax import latents
from tests.latents.oracles import POSTERIORS, call, every_posterior

KEY = jax.random.key(0)
LOW_RANK = pytest.mark.parametrize(
    "post",
    [post for post in POSTERIORS.values() if "lowrank" in post.name],
    ids=[name for name in POSTERIORS if "lowrank" in name],
)


@every_posterior
def test_it_is_the_prior(post):
    bias = post.initial_bias(KEY)
    assert bias.shape == (post.num_params,)
    params = post.unpack(bias)
    assert np.all(np.asarray(call(post, "kl_per_map", params)) == 0)
    assert np.all(np.asarray(call(post, "mean", params)) == 0)
    assert np.all(np.asarray(call(post, "stddev", params)) == 1)


@every_posterior
def test_only_nu_is_not_zero(post):
    for name, leaf in post.unpack(post.initial_bias(KEY)).items():
        assert np.all(np.asarray(leaf) != 0) if name == "nu" else np.all(np.asarray(leaf) == 0)


@LOW_RANK
def test_nu_has_unit_root_mean_square_over_the_width(post):
    nu = post.unpack(post.initial_bias(KEY))["nu"]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(nu**2, axis=0)), 1, rtol=1e-6)


@LOW_RANK
def test_it_is_drawn_from_the_key(post):
    first, again = post.initial_bias(KEY), post.initial_bias(KEY)
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(post.initial_bias(jax.random.key(1))))


@LOW_RANK
def test_ranks_and_maps_start_apart(post):
    nu = np.asarray(post.unpack(post.initial_bias(KEY))["nu"])
    columns = nu.reshape(post.width, -1).T
    assert len(np.unique(columns, axis=0)) == len(columns)


@LOW_RANK
def test_the_mean_is_odd_in_the_features_to_first_order(post):
    """With zero bias M(f) = M(−f), so that no feature's sign can be told; with this one it can."""
    weights = jax.random.normal(jax.random.key(1), (post.num_params,))

    @jax.jit
    def mean(bias, feature):
        return post.mean(post.unpack(bias + weights * feature))

    zero, start = jnp.zeros(post.num_params), post.initial_bias(KEY)
    np.testing.assert_array_equal(mean(zero, 0.1), mean(zero, -0.1))
    assert np.all(np.asarray(mean(start, 0.1) != mean(start, -0.1)))

    slope_at_zero = jax.jacobian(mean, argnums=1)(zero, 0.0)
    slope = jax.jacobian(mean, argnums=1)(start, 0.0)
    assert np.all(np.asarray(slope_at_zero) == 0)
    assert np.all(np.asarray(slope) != 0)


@LOW_RANK
def test_a_loss_of_the_mean_moves_mu(post):
    """Emitting nothing is no saddle: what the decoder asks of the mean reaches μ."""
    target = jax.random.normal(jax.random.key(1), (post.height, post.width, post.maps))

    def loss(params):
        return jnp.sum((post.mean(params) - target) ** 2)

    grads = jax.grad(loss)(post.unpack(post.initial_bias(KEY)))
    assert np.all(np.asarray(grads["mu"]) != 0)
    stuck = jax.grad(loss)(post.unpack(jnp.zeros(post.num_params)))
    assert np.all(np.asarray(stuck["mu"]) == 0)
    assert np.all(np.asarray(stuck["nu"]) == 0)


def test_rank_two_starts_with_two_directions():
    post = latents.make("lowrank", height=4, width=4, maps=3, rank=2)
    nu = np.asarray(post.unpack(post.initial_bias(KEY))["nu"])
    assert all(np.linalg.matrix_rank(nu[:, :, n]) == 2 for n in range(3))


@every_posterior
def test_only_nu_and_the_factors_of_full_covariances_are_slow(post):
    scale = post.output_scale
    assert scale.shape == (post.num_params,)
    slow = {"nu": 0.001, "row_lower": 0.1, "col_lower": 0.1}
    for name, leaf in post.unpack(jnp.asarray(scale)).items():
        assert np.all(np.asarray(leaf) == np.float32(slow.get(name, 1.0))), name
