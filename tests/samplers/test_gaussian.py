"""The aggregate posterior's moments, and the prior and the Gaussian drawn from them."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from svae_jax import latents, sampler_config, samplers
from svae_jax.errors import UserError
from svae_jax.model import SpatialVAE
from svae_jax.samplers import aggregate, base
from tests.latents.oracles import one_of_each_name
from tests.samplers.toys import dense_moments


class Linear(nn.Module):
    """Emits a linear function of the pixels: an encoder whose posteriors are known."""

    num_params: int

    @nn.compact
    def __call__(self, images, train):
        return 0.5 * nn.Dense(self.num_params)(images.reshape(len(images), -1))


def toy(post, count):
    """A model with a linear encoder, its variables, images, and the images' posteriors."""
    model = SpatialVAE(post, Linear(post.num_params), nn.Dense(1))
    pixels = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3)).astype(np.uint8)
    floats = jnp.asarray((pixels.astype(np.float32) - 127.5) / 127.5)
    variables = model.init(jax.random.key(0), floats, method="encode")
    return model, variables, pixels, model.apply(variables, floats, method="encode")


@one_of_each_name
def test_moments_are_those_of_a_dense_computation(post, monkeypatch):
    monkeypatch.setattr(aggregate, "_BATCH", 8)  # so that the last of three batches is not whole
    model, variables, pixels, params = toy(post, 23)
    moments = aggregate.moments(aggregate.encode(model, variables, pixels))
    mean, covariance = dense_moments(post, params)
    np.testing.assert_allclose(moments.mean, mean, atol=1e-6)
    np.testing.assert_allclose(moments.covariance, covariance, rtol=1e-5, atol=1e-6)
    assert moments.covariance.dtype == np.float64


@one_of_each_name
@pytest.mark.parametrize("mirrored", [False, True])
def test_moments_of_neighbours_are_those_of_a_dense_covariance(post, mirrored, monkeypatch):
    monkeypatch.setattr(aggregate, "_BATCH", 8)  # so that the last of three batches is not whole
    model, variables, pixels, _ = toy(post, 23)
    size = {"height": post.height, "width": post.width, "maps": post.maps}
    prior = latents.make_prior("autoregressive", **size)
    which = {"chosen": np.arange(20), "mirrored": mirrored}
    found = aggregate.neighbourhoods(model, variables, pixels, prior, **which)
    dense = aggregate.moments(aggregate.encode(model, variables, pixels, **which))
    expected = prior.of_moments(dense.mean.reshape(found.mean.shape), dense.covariance)
    np.testing.assert_allclose(found.mean.ravel(), dense.mean, atol=1e-6)
    cells = post.height * post.width
    blocks = dense.covariance.reshape(cells, post.maps, cells, post.maps)
    for b, c in np.ndindex(prior.num_members, prior.num_members):
        sums = np.einsum("ac,akcl->kl", prior.pair_weights(b, c), blocks)
        np.testing.assert_allclose(found.sums[b, :, c], sums, rtol=1e-6, atol=1e-6)
    params = prior.of_neighbourhoods(found.mean, found.sums)
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-3, atol=1e-4)


@one_of_each_name
def test_the_gaussian_has_the_mean_and_covariance_of_the_aggregate_posterior(post):
    """To Monte-Carlo error, off-diagonal entries included."""
    model, variables, pixels, params = toy(post, 40)
    sampler = samplers.Gaussian((post.height, post.width, post.maps))
    posteriors = aggregate.posteriors(model, variables, pixels, jax.random.key(1))
    count = 20_000
    z = samplers.draw(sampler, samplers.fit(sampler, posteriors), jax.random.key(0), count)
    assert z.shape == (count, *sampler.shape)
    assert z.dtype == jnp.float32
    mean, covariance = dense_moments(post, params)
    flat = np.asarray(z, np.float64).reshape(count, -1)
    variances = np.diag(covariance)
    errors = np.abs(flat.mean(axis=0) - mean) / np.sqrt(variances / count)
    assert errors.max() < 5
    # The variance of a sample covariance of a Gaussian (Wishart).
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / count)
    assert np.max(np.abs(np.cov(flat.T) - covariance) / spread) < 5


def test_far_from_zero_no_digits_are_lost():
    rng = np.random.default_rng(0)
    means = (1000.0 + rng.normal(size=(300, 3))).astype(np.float32)
    batches = [aggregate.Encoded(m, np.zeros((3, 1, 1), np.float32)) for m in np.split(means, 6)]
    expected = np.cov(means.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(aggregate.moments(batches).of_means, expected, rtol=1e-9)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="batches must hold at least one image"):
        aggregate.moments([])


def test_jitter_is_added_only_where_it_is_needed():
    positive = np.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_array_equal(base.cholesky(positive), np.linalg.cholesky(positive))
    singular = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    factor = base.cholesky(singular)
    np.testing.assert_allclose(factor @ factor.T, singular, atol=1e-5)
    for wrong in (np.diag([1.0, -1.0]), np.diag([1.0, np.nan])):
        with pytest.raises(ValueError, match="covariance must be finite and positive"):
            base.cholesky(wrong)


def test_the_prior_has_the_temperature_as_its_standard_deviation():
    prior = latents.make_prior("standard", height=2, width=3, maps=5)
    z = samplers.draw(samplers.Prior(prior, 0.5), {}, jax.random.key(0), 5000)
    assert z.shape == (5000, 2, 3, 5)
    assert float(z.std()) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(ValueError, match="temperature must be 0 or above, got temperature=-1"):
        samplers.Prior(prior, -1.0)


def test_a_latent_does_not_depend_on_how_many_are_drawn_beside_it():
    sampler = samplers.Gaussian((1, 2, 3))
    params = {"mean": np.ones(6, np.float32), "factor": np.tril(np.ones((6, 6), np.float32))}
    key = jax.random.key(3)
    many = samplers.draw(sampler, params, key, 600)
    np.testing.assert_array_equal(samplers.draw(sampler, params, key, 7), many[:7])
    np.testing.assert_array_equal(
        samplers.draw(sampler, params, key, 300, first=240), many[240:540]
    )
    assert len(np.unique(np.asarray(many), axis=0)) == 600
    for count, first, message in ((0, 0, "count must be"), (1, -1, "first must be")):
        with pytest.raises(ValueError, match=message):
            samplers.draw(sampler, params, key, count, first)


@pytest.mark.parametrize("name", [name for name in latents.names() if name != "vector"])
def test_a_batch_has_no_covariance_for_each_image(name):
    """Nothing in the program of an encoded batch is nearly as large as [b, n, hw, hw]."""
    post = latents.make(name, height=4, width=4, maps=2)
    model, variables, pixels, _ = toy(post, 64)
    program = jax.make_jaxpr(aggregate._encode, static_argnums=0)(
        model, variables, pixels, np.ones(64, bool)
    )
    values = [v.aval for e in _equations(program.jaxpr) for v in e.outvars]
    sizes = [value.size for value in values if hasattr(value, "size")]
    assert max(sizes) <= 64 * post.maps * 16**2 / 4


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize("name", latents.names())
def test_covariances_are_added_as_one_by_one(name):
    """In closed form, and for a covariance of the user's own."""
    size = (1, 1) if name == "vector" else (3, 2)
    post = latents.make(name, height=size[0], width=size[1], maps=2)
    flat = 0.5 * jax.random.normal(jax.random.key(0), (4, post.num_params))
    params, weights = post.unpack(flat), jnp.array([1.0, 0.0, 2.0, 0.5])
    expected = jnp.tensordot(weights, post.covariance(params), 1)
    np.testing.assert_allclose(post.total_covariance(params, weights), expected, atol=1e-5)
    own = dataclasses.replace(post, covariance_model=_Hidden(post.covariance_model))
    np.testing.assert_allclose(own.total_covariance(params, weights), expected, atol=1e-5)


class _Hidden:
    """A covariance without closed forms."""

    def __init__(self, covariance):
        for name in ("shapes", "colour", "whiten", "log_det", "trace", "stddev"):
            setattr(self, name, getattr(covariance, name))


def test_the_kronecker_gaussian_finds_factors_of_a_product():
    rng = np.random.default_rng(0)
    shape = (2, 3, 4)
    factors = [np.tril(rng.normal(size=(n, n))) + 2 * np.eye(n) for n in shape]
    mean = rng.normal(size=shape)
    white = rng.normal(size=(40_000, *shape))
    z = mean + np.einsum("bijk,pi,qj,rk->bpqr", white, *factors)
    sampler = samplers.Kronecker(shape)
    batches = np.split(z.astype(np.float32), 8)
    params = samplers.fit(sampler, aggregate.Posteriors(tuple, lambda: batches))
    found = np.kron(np.kron(params["rows"], params["cols"]), params["maps"])
    wanted = np.kron(np.kron(factors[0], factors[1]), factors[2])
    scale = np.abs(wanted @ wanted.T).max()
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=0.03 * scale)
    drawn = np.asarray(samplers.draw(sampler, params, jax.random.key(0), 20_000))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.1 * np.sqrt(scale))
    covariance = np.cov(drawn.reshape(len(drawn), -1).T)
    np.testing.assert_allclose(covariance, wanted @ wanted.T, atol=0.05 * scale)
    with pytest.raises(ValueError, match="batches must hold at least one image"):
        aggregate.axis_covariances([])


def test_full_covariances_are_refused_for_many_latents():
    for name in ("gaussian", "mixture", "flow"):
        sampler_config.make(sampler_config.base(), name, (32, 32, 8))
        with pytest.raises(
            UserError, match=rf"{name}.latents must be at most 8,192.*9,216: .*kronecker"
        ):
            sampler_config.make(sampler_config.base(), name, (32, 32, 9))
    assert sampler_config.make(sampler_config.base(), "kronecker", (64, 64, 9)).shape == (64, 64, 9)
