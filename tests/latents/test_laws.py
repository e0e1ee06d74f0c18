"""What must hold whatever the encoder emits, over values that Hypothesis chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svae_jax import latents
from tests.latents.oracles import POSTERIORS, call, every_posterior, one_of_each_name

pytestmark = pytest.mark.usefixtures("x64")

# The fixture only switches float64 on, so that it may serve all examples of a test.
laws = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
KEY = np.array([0, 5], np.uint32)


def numbers(size, limit=4.0):
    """Arrays ``[size]`` of values within ±limit."""
    values = st.floats(-limit, limit, allow_subnormal=False)
    return hnp.arrays(np.float64, size, elements=values, fill=st.nothing())


def make(name, **sizes):
    return latents.make(name, **({"height": 3, "width": 2, "maps": 2} | sizes))


def assert_same_distribution(first, first_params, second, second_params):
    """Equal mean, deviation, KL, density and samples."""
    z = call(first, "sample", KEY, first_params)
    np.testing.assert_allclose(call(second, "sample", KEY, second_params), z, **TIGHT)
    for method in ("mean", "stddev", "kl_per_map", "kl"):
        np.testing.assert_allclose(
            call(first, method, first_params), call(second, method, second_params), **TIGHT
        )
    np.testing.assert_allclose(
        call(first, "log_prob", first_params, z),
        call(second, "log_prob", second_params, z),
        **TIGHT,
    )


@one_of_each_name
def test_kl_is_zero_at_the_prior(post):
    prior = post.unpack(jnp.zeros((2, post.num_params)))
    assert np.all(np.asarray(call(post, "kl_per_map", prior)) == 0)
    assert np.all(np.asarray(call(post, "mean", prior)) == 0)
    assert np.all(np.asarray(call(post, "stddev", prior)) == 1)


@every_posterior
@laws
@given(data=st.data())
def test_kl_is_not_negative_and_the_sum_over_the_maps(post, data):
    params = post.unpack(jnp.asarray(data.draw(numbers(post.num_params))))
    per_map = np.asarray(call(post, "kl_per_map", params))
    assert np.all(per_map >= -1e-12)
    np.testing.assert_allclose(call(post, "kl", params), per_map.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mvn", "lowrank", "mvn_full", "lowrank_full"])
@laws
@given(data=st.data(), log_c=st.floats(-3, 3))
def test_a_factor_moved_between_omega_and_psi_changes_nothing(name, data, log_c):
    post = POSTERIORS[name]
    params = post.unpack(jnp.asarray(data.draw(numbers(post.num_params))))
    moved = params | {
        "row_log_variance": params["row_log_variance"] + log_c,
        "col_log_variance": params["col_log_variance"] - log_c,
    }
    assert_same_distribution(post, params, post, moved)


@pytest.mark.parametrize("name", ["lowrank", "lowrank_rank_2", "lowrank_full"])
@laws
@given(data=st.data(), c=st.floats(0.1, 10), sign=st.sampled_from([-1, 1]))
def test_a_factor_moved_between_mu_and_nu_changes_nothing(name, data, c, sign):
    post = POSTERIORS[name]
    params = post.unpack(jnp.asarray(data.draw(numbers(post.num_params))))
    moved = params | {"mu": params["mu"] * sign * c, "nu": params["nu"] / (sign * c)}
    assert_same_distribution(post, params, post, moved)


@pytest.mark.parametrize("pair", [("lowrank", "mvn"), ("lowrank_full", "mvn_full")])
@pytest.mark.parametrize("rank", [1, 2])
@laws
@given(data=st.data())
def test_lowrank_is_mvn_at_the_outer_product(pair, rank, data):
    low_rank, free = make(pair[0], rank=rank), make(pair[1])
    params = low_rank.unpack(jnp.asarray(data.draw(numbers(low_rank.num_params))))
    mean = sum(
        np.asarray(params["mu"])[:, None, r] * np.asarray(params["nu"])[None, :, r]
        for r in range(rank)
    )
    assert np.all([np.linalg.matrix_rank(mean[..., n]) <= rank for n in range(2)])
    free_params = {name: params[name] for name in params if name not in ("mu", "nu")}
    assert_same_distribution(low_rank, params, free, free_params | {"mean": jnp.asarray(mean)})


@laws
@given(data=st.data())
def test_one_by_one_mvn_is_vector_with_the_summed_log_variances(data):
    mvn, vector = make("mvn", height=1, width=1), make("vector", height=1, width=1)
    params = mvn.unpack(jnp.asarray(data.draw(numbers(mvn.num_params))))
    log_variance = params["row_log_variance"] + params["col_log_variance"]
    vector_params = {"mean": params["mean"], "log_variance": log_variance[:, None, :]}
    assert_same_distribution(mvn, params, vector, vector_params)


@laws
@given(flat=numbers(10))
def test_vector_is_naive_on_one_by_one_maps(flat):
    vector = make("vector", height=1, width=1, maps=5)
    naive = make("naive", height=1, width=1, maps=5)
    flat = jnp.asarray(flat)
    assert_same_distribution(vector, vector.unpack(flat), naive, naive.unpack(flat))


@pytest.mark.parametrize("pair", [("mvn_full", "mvn"), ("lowrank_full", "lowrank")])
@laws
@given(data=st.data())
def test_full_without_entries_below_the_diagonal_is_diagonal(pair, data):
    full, diagonal = make(pair[0]), make(pair[1])
    params = diagonal.unpack(jnp.asarray(data.draw(numbers(diagonal.num_params))))
    lower = {"row_lower": jnp.zeros((3, 2)), "col_lower": jnp.zeros((1, 2))}
    assert_same_distribution(full, params | lower, diagonal, params)


@laws
@given(data=st.data())
def test_mvn_is_naive_with_the_outer_sum_of_log_variances(data):
    mvn, naive = make("mvn"), make("naive")
    params = mvn.unpack(jnp.asarray(data.draw(numbers(mvn.num_params))))
    log_variance = params["row_log_variance"][:, None] + params["col_log_variance"][None, :]
    assert_same_distribution(
        mvn, params, naive, {"mean": params["mean"], "log_variance": log_variance}
    )


@one_of_each_name
@laws
@given(data=st.data())
def test_log_prob_falls_by_half_the_squared_noise(post, data):
    """log q(M) − log q(z) = ½‖E‖², whatever the parameters, with E the noise that made z."""
    params = post.unpack(jnp.asarray(data.draw(numbers(post.num_params, limit=2.0))))
    z = call(post, "sample", KEY, params)
    shape = (post.height, post.width, post.maps)
    noise = jax.random.normal(jax.random.wrap_key_data(KEY), shape, jnp.float64)
    at_mode = call(post, "log_prob", params, call(post, "mean", params))
    fall = at_mode - call(post, "log_prob", params, z)
    np.testing.assert_allclose(fall, 0.5 * jnp.sum(noise**2), rtol=1e-8)
