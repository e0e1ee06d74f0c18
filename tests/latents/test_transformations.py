"""Under jit, vmap, grad and hessian, with any batch, in the dtype of the parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax import latents
from tests.latents.oracles import (
    POSTERIORS,
    call,
    every_posterior,
    one_of_each_name,
    random_flat,
    random_params,
)

KEY = jax.random.key(3)


def results(post, flat, z):
    """Everything a posterior computes, by name, from what an encoder emits."""
    params = post.unpack(flat)
    sample, its_log_prob = post.sample_and_log_prob(KEY, params)
    return {
        "mean": post.mean(params),
        "stddev": post.stddev(params),
        "sample": post.sample(KEY, params),
        "log_prob": post.log_prob(params, z),
        "sample and": sample,
        "its log_prob": its_log_prob,
        "kl": post.kl(params),
        "kl_per_map": post.kl_per_map(params),
    }


def shapes_and_dtypes(post, batch, dtype):
    """Those of `results`, without computing them."""
    flat = jax.ShapeDtypeStruct((*batch, post.num_params), dtype)
    z = jax.ShapeDtypeStruct((*batch, post.height, post.width, post.maps), dtype)
    return jax.eval_shape(partial(results, post), flat, z)


@every_posterior
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
def test_shapes_for_any_batch(post, batch):
    maps = (*batch, post.height, post.width, post.maps)
    found = shapes_and_dtypes(post, batch, jnp.float32)
    assert {name: leaf.shape for name, leaf in found.items()} == {
        "mean": maps,
        "stddev": maps,
        "sample": maps,
        "log_prob": batch,
        "sample and": maps,
        "its log_prob": batch,
        "kl": batch,
        "kl_per_map": (*batch, post.maps),
    }


@one_of_each_name
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_results_have_the_dtype_of_the_parameters(post, dtype):
    found = shapes_and_dtypes(post, (2,), dtype)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(dtype)}


@one_of_each_name
@pytest.mark.usefixtures("x64")
def test_a_batch_is_its_examples(post):
    """For all but the samples, whose noise depends on the batch it is drawn for."""

    @jax.jit
    def deterministic(flat, z):
        found = results(post, flat, z)
        return {name: found[name] for name in ("mean", "stddev", "log_prob", "kl", "kl_per_map")}

    flat = random_flat(post, (2, 3))
    z = jax.random.normal(KEY, (2, 3, post.height, post.width, post.maps))
    batched = deterministic(flat, z)
    mapped = jax.vmap(jax.vmap(deterministic))(flat, z)
    single = deterministic(flat[1, 2], z[1, 2])
    for name, value in batched.items():
        np.testing.assert_allclose(mapped[name], value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(single[name], value[1, 2], rtol=1e-12, atol=1e-12)


def numerical_jacobian(function, flat, step=1e-5):
    """Central differences of a function of ``[p]``: ``[results, p]``."""
    steps = step * jnp.eye(flat.size)
    ahead, behind = jax.vmap(function)(flat + steps), jax.vmap(function)(flat - steps)
    return ((ahead - behind) / (2 * step)).T


@one_of_each_name
@pytest.mark.usefixtures("x64")
def test_gradients_are_the_numerical_ones(post):
    z = jax.random.normal(KEY, (post.height, post.width, post.maps))

    @jax.jit
    def joined(flat):
        return jnp.concatenate([leaf.ravel() for leaf in results(post, flat, z).values()])

    flat = random_flat(post)
    jacobian = jax.jit(jax.jacrev(joined))(flat)
    scale = float(jnp.abs(jacobian).max())
    np.testing.assert_allclose(jacobian, numerical_jacobian(joined, flat), atol=1e-8 * scale)


@pytest.mark.usefixtures("x64")
def test_gradient_of_a_sample():
    """dz_ij/dm_ij = 1 and dz_ij/d(log ω_i) = dz_ij/d(log ψ_j) = ½(z_ij − m_ij)."""
    post = POSTERIORS["mvn"]
    params = random_params(post)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2, 2)))
    grads = jax.grad(lambda params: jnp.sum(weights * post.sample(KEY, params)))(params)
    half = 0.5 * weights * (post.sample(KEY, params) - params["mean"])
    np.testing.assert_allclose(grads["mean"], weights, rtol=1e-12)
    np.testing.assert_allclose(grads["row_log_variance"], half.sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(grads["col_log_variance"], half.sum(axis=0), rtol=1e-10)


@one_of_each_name
def test_every_number_moves_a_sample_and_the_kl(post):
    @jax.jit
    def gradients(flat):
        of_sample = jax.grad(lambda flat: jnp.sum(post.sample(KEY, post.unpack(flat)) ** 2))(flat)
        return of_sample, jax.grad(lambda flat: post.kl(post.unpack(flat)))(flat)

    for gradient in gradients(random_flat(post, dtype=np.float32)):
        assert np.all(np.asarray(gradient) != 0)


@one_of_each_name
@pytest.mark.usefixtures("x64")
def test_hessian_of_the_kl(post):
    flat = random_flat(post)
    gradient = jax.jit(jax.grad(lambda flat: post.kl(post.unpack(flat))))
    hessian = jax.jit(jax.hessian(lambda flat: post.kl(post.unpack(flat))))(flat)
    scale = float(jnp.abs(hessian).max())
    np.testing.assert_allclose(hessian, numerical_jacobian(gradient, flat), atol=1e-8 * scale)
    if post.name in ("vector", "naive"):
        # ½m² and ½exp(log σ²) are all that is not linear in the KL.
        params = post.unpack(flat)
        diagonal = [jnp.ones(params["mean"].size), 0.5 * jnp.exp(params["log_variance"]).ravel()]
        np.testing.assert_allclose(hessian, jnp.diag(jnp.concatenate(diagonal)), atol=1e-12)


def test_a_posterior_is_a_static_argument_traced_once():
    traces = []

    @partial(jax.jit, static_argnums=0)
    def kl(post, flat):
        traces.append(post)
        return post.kl(post.unpack(flat))

    for _ in range(2):
        post = latents.make("lowrank", height=3, width=2, maps=4, rank=2)
        kl(post, jnp.zeros((5, post.num_params)))
    assert len(traces) == 1
    other = latents.make("lowrank_full", height=3, width=2, maps=4, rank=2)
    kl(other, jnp.zeros((5, other.num_params)))
    assert len(traces) == 2


@one_of_each_name
def test_another_key_gives_another_sample(post):
    params = random_params(post, (2,), dtype=np.float32)
    first, again = call(post, "sample", KEY, params), call(post, "sample", KEY, params)
    other = call(post, "sample", jax.random.key(4), params)
    np.testing.assert_array_equal(first, again)
    assert np.all(np.asarray(first) != np.asarray(other))


@pytest.mark.parametrize("name", ["lowrank", "mvn_full"])
def test_half_precision_computes(name):
    post = POSTERIORS[name]
    params = random_params(post, (2,), dtype=jnp.bfloat16)
    z, log_prob = call(post, "sample_and_log_prob", KEY, params)
    np.testing.assert_allclose(
        np.asarray(call(post, "log_prob", params, z), np.float32),
        np.asarray(log_prob, np.float32),
        rtol=0.05,
    )


def test_old_style_keys_work():
    post = POSTERIORS["mvn"]
    params = random_params(post, dtype=np.float32)
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    np.testing.assert_array_equal(post.sample(old, params), post.sample(new, params))
