"""Priors against dense Gaussians in NumPy and SciPy, over every posterior."""

import inspect
import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy import stats

from svae_jax import latents
from svae_jax.latents import priors
from svae_jax.latents.means import FreeMean
from tests.latents.oracles import (
    POSTERIORS,
    call,
    dense_posterior,
    dense_prior,
    every_posterior,
    one_of_each_name,
    random_params,
    random_prior_params,
)

pytestmark = pytest.mark.usefixtures("x64")

LEARNED = ("tensor_normal", "matrix_normal", "autoregressive")
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
KEY = jax.random.key(0)
SIZES = {"height": 3, "width": 2, "maps": 2}

every_prior = pytest.mark.parametrize("name", latents.prior_names())
every_learned_prior = pytest.mark.parametrize("name", LEARNED)
laws = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def prior_of(post, name):
    """The prior of that name with the sizes of a posterior."""
    return latents.make_prior(name, height=post.height, width=post.width, maps=post.maps)


@partial(jax.jit, static_argnums=(0, 1))
def terms(prior, post, q_params, params):
    """The KL by map and by location."""
    return (
        prior.kl_per_map(post, q_params, params),
        prior.kl_per_location(post, q_params, params),
    )


def dense_terms(prior, post, q_params, params):
    """The KL of one example, its terms by map ``[n]`` and by location ``[hw]``."""
    mean, covariance = dense_posterior(post, q_params)
    prior_mean, whitening = dense_prior(prior, params)
    precision = whitening.T @ whitening
    deviation = mean - prior_mean
    quadratic = np.trace(precision @ covariance) + deviation @ precision @ deviation
    log_det = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(precision)[1]
    kl = 0.5 * (quadratic - len(mean) - log_det)

    whitened = np.diag(whitening @ covariance @ whitening.T) + (whitening @ deviation) ** 2
    log_whitening = np.log(np.diag(whitening)).reshape(-1, post.maps)
    whitened = whitened.reshape(-1, post.maps)
    by_entry = 0.5 * (whitened - 1) - log_whitening
    log_variance = np.log(np.diag(covariance)).reshape(-1, post.maps)
    blocks = [covariance[k :: post.maps, k :: post.maps] for k in range(post.maps)]
    per_map = by_entry.sum(axis=0) - 0.5 * np.linalg.slogdet(np.stack(blocks))[1]
    return kl, per_map, (by_entry - 0.5 * log_variance).sum(axis=-1)


def total_correlation(post, q_params):
    """The divergence of q from the product of its marginals."""
    _, covariance = dense_posterior(post, q_params)
    return 0.5 * (np.sum(np.log(np.diag(covariance))) - np.linalg.slogdet(covariance)[1])


@every_posterior
@every_prior
def test_kl_is_that_of_dense_gaussians(post, name):
    prior = prior_of(post, name)
    q_params, params = random_params(post, (2,)), random_prior_params(prior)
    per_map, per_location = terms(prior, post, q_params, params)
    assert per_map.shape == (2, post.maps)
    assert per_location.shape == (2, post.height, post.width)
    for i in range(2):
        one = {key: leaf[i] for key, leaf in q_params.items()}
        kl, dense_per_map, dense_per_location = dense_terms(prior, post, one, params)
        np.testing.assert_allclose(per_map[i].sum(), kl, **TIGHT)
        np.testing.assert_allclose(per_map[i], dense_per_map, **TIGHT)
        np.testing.assert_allclose(per_location[i].ravel(), dense_per_location, **TIGHT)
        gap = total_correlation(post, one)
        assert gap > 0.01 if "full" in post.name else abs(gap) < 1e-12
        np.testing.assert_allclose(per_location[i].sum(), kl - gap, **TIGHT)


@one_of_each_name
@every_learned_prior
def test_kl_is_the_mean_log_ratio_of_samples(post, name):
    samples = 20_000
    prior = prior_of(post, name)
    q_params, params = random_params(post), random_prior_params(prior)
    copies = {key: jnp.broadcast_to(leaf, (samples, *leaf.shape)) for key, leaf in q_params.items()}
    z, log_q = call(post, "sample_and_log_prob", KEY, copies)
    ratio = np.asarray(log_q - call(prior, "log_prob", params, z))
    kl = terms(prior, post, q_params, params)[0].sum()
    assert abs(ratio.mean() - kl) < 4.5 * ratio.std() / np.sqrt(samples)


@every_posterior
@every_prior
def test_log_prob_is_scipys(post, name):
    prior = prior_of(post, name)
    params = random_prior_params(prior)
    mean, whitening = dense_prior(prior, params)
    z = np.random.default_rng(1).normal(size=(2, 3, post.height, post.width, post.maps))
    covariance = np.linalg.inv(whitening.T @ whitening)
    expected = stats.multivariate_normal(mean, covariance).logpdf(z.reshape(2, 3, -1))
    found = call(prior, "log_prob", params, jnp.asarray(z))
    np.testing.assert_allclose(found, expected.reshape(2, 3), rtol=1e-9)


@every_prior
def test_samples_are_whitened_to_the_noise(name):
    """z = M₀ + W⁻¹ε, with the noise that is the sample of the standard normal."""
    prior = latents.make_prior(name, **SIZES)
    params = random_prior_params(prior)
    mean, whitening = dense_prior(prior, params)
    z = np.asarray(prior.sample(KEY, params, (4, 5))).reshape(20, -1)
    noise = latents.sample_prior(KEY, (4, 5), **SIZES).reshape(20, -1)
    np.testing.assert_allclose((z - mean) @ whitening.T, noise, rtol=1e-8, atol=1e-8)


@every_prior
def test_mean_and_covariance_of_samples(name):
    samples = 20_000
    prior = latents.make_prior(name, **SIZES)
    params = random_prior_params(prior)
    mean, whitening = dense_prior(prior, params)
    covariance = np.linalg.inv(whitening.T @ whitening)
    deviation = np.asarray(prior.sample(KEY, params, (samples,))).reshape(samples, -1) - mean
    variances = np.diag(covariance)
    error = np.sqrt(variances / samples)
    assert np.all(np.abs(deviation.mean(axis=0)) < 4.5 * error)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / samples)
    assert np.all(np.abs(deviation.T @ deviation / samples - covariance) < 4.5 * error)


@every_prior
@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_shapes_for_any_batch(name, batch):
    post = POSTERIORS["mvn_full"]
    prior = prior_of(post, name)
    params = prior.initial()
    z = prior.sample(KEY, params, batch)
    assert z.shape == (*batch, 3, 2, 2)
    assert prior.log_prob(params, z).shape == batch
    per_map, per_location = jax.eval_shape(
        partial(terms, prior, post), random_params(post, batch), params
    )
    assert per_map.shape == (*batch, 2)
    assert per_location.shape == (*batch, 3, 2)


@every_prior
def test_samples_are_of_the_default_float(name):
    with jax.enable_x64(False):
        prior = latents.make_prior(name, **SIZES)
        assert prior.sample(KEY, prior.initial(), (2,)).dtype == jnp.float32


# The standard normal.


@one_of_each_name
def test_standard_keeps_the_bits_of_its_expressions(post):
    prior = prior_of(post, "standard")
    params = random_params(post, (3,), dtype=np.float32)
    mean, stddev, model = post.mean(params), post.stddev(params), post.covariance_model
    squared_mean = jnp.sum(mean**2, axis=(-3, -2))
    trace, log_det = model.trace(params), model.log_det(params)
    kl = 0.5 * (trace + squared_mean - post.height * post.width - log_det)
    np.testing.assert_array_equal(prior.kl_per_map(post, params, {}), kl)
    np.testing.assert_array_equal(post.kl_per_map(params), kl)
    np.testing.assert_array_equal(post.kl(params), jnp.sum(kl, axis=-1))
    marginal = 0.5 * (stddev**2 + mean**2 - 1) - jnp.log(stddev)
    np.testing.assert_array_equal(post.marginal_kl(params), marginal)
    np.testing.assert_array_equal(
        prior.kl_per_location(post, params, {}), jnp.sum(marginal, axis=-1)
    )
    noise = jax.random.normal(KEY, (3, post.height, post.width, post.maps))
    np.testing.assert_array_equal(prior.sample(KEY, {}, (3,)), noise)


@one_of_each_name
@every_learned_prior
def test_learned_priors_start_at_the_standard_normal(post, name):
    prior, standard = prior_of(post, name), prior_of(post, "standard")
    q_params, zeros = random_params(post, (2,)), prior.initial()
    assert all(np.all(np.asarray(leaf) == 0) for leaf in zeros.values())
    for found, expected in zip(
        terms(prior, post, q_params, zeros), terms(standard, post, q_params, {}), strict=True
    ):
        np.testing.assert_allclose(found, expected, **TIGHT)
    z = prior.sample(KEY, zeros, (2,))
    np.testing.assert_array_equal(z, standard.sample(KEY, {}, (2,)))
    np.testing.assert_allclose(prior.log_prob(zeros, z), standard.log_prob({}, z), **TIGHT)


# What a prior needs of a covariance.


@dataclass(frozen=True)
class Isotropic:
    """A user's covariance σ²I, without the optional method."""

    height: int
    width: int
    maps: int

    @property
    def shapes(self):
        return {"log_variance": (1, 1, self.maps)}

    def colour(self, params, noise):
        return jnp.exp(0.5 * params["log_variance"]) * noise

    def whiten(self, params, deviation):
        return jnp.exp(-0.5 * params["log_variance"]) * deviation

    def log_det(self, params):
        return self.height * self.width * params["log_variance"][..., 0, 0, :]

    def trace(self, params):
        return self.height * self.width * jnp.exp(params["log_variance"][..., 0, 0, :])

    def stddev(self, params):
        return self.colour(params, jnp.ones((self.height, self.width, self.maps)))


class Bare:
    """A covariance reduced to the methods that are not optional."""

    def __init__(self, full):
        for name in ("shapes", "colour", "whiten", "log_det", "trace", "stddev"):
            setattr(self, name, getattr(full, name))


def bare(post):
    return latents.Posterior(post.name, post.mean_model, Bare(post.covariance_model))


ISOTROPIC = latents.Posterior("isotropic", FreeMean(3, 2, 2), Isotropic(3, 2, 2))


@every_posterior
@pytest.mark.parametrize("strip", [False, True], ids=["closed form", "fallback"])
def test_weighted_trace_and_projected_variances(post, strip):
    params = random_params(post, (2, 3))
    covariance = np.asarray(post.covariance(params))
    locations = post.height * post.width
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(locations, locations)))
    post = bare(post) if strip else post
    np.testing.assert_allclose(
        call(post, "weighted_trace", params, matrix),
        np.trace(np.asarray(matrix) @ covariance, axis1=-2, axis2=-1),
        **TIGHT,
    )
    np.testing.assert_allclose(
        call(post, "projected_variances", params, matrix[:2]),
        np.einsum("ra,...nab,rb->...rn", matrix[:2], covariance, matrix[:2]),
        **TIGHT,
    )


@every_prior
def test_a_users_covariance_needs_no_weighted_trace(name):
    params = random_params(ISOTROPIC, (2,))
    naive = POSTERIORS["naive"]
    log_variance = jnp.broadcast_to(params["log_variance"], params["mean"].shape)
    prior = prior_of(naive, name)
    prior_params = random_prior_params(prior)
    found = terms(prior, ISOTROPIC, params, prior_params)
    expected = terms(prior, naive, params | {"log_variance": log_variance}, prior_params)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **TIGHT)


@pytest.mark.parametrize("strip", [False, True], ids=["closed form", "fallback"])
def test_no_array_of_full_covariances(strip):
    """Neither values nor gradients hold ``[*batch, n, hw, hw]``."""
    batch, locations, maps = 5, 12, 7
    post = latents.make("mvn_full", height=3, width=4, maps=maps)
    prior = prior_of(post, "matrix_normal")
    post = bare(post) if strip else post
    params = random_params(post, (batch,)), random_prior_params(prior)

    def both(q_params, params):
        per_map, gradients = jax.value_and_grad(
            lambda *args: jnp.sum(prior.kl_per_map(post, *args)), argnums=(0, 1)
        )(q_params, params)
        return per_map, gradients, prior.kl_per_location(post, q_params, params)

    program = str(jax.make_jaxpr(both)(*params))
    sizes = [np.prod([*map(int, s.split(","))]) for s in re.findall(r"f64\[([\d,]+)\]", program)]
    assert len(sizes) > 100
    assert max(sizes) < batch * maps * locations**2


@dataclass(frozen=True)
class Smooth(priors.KroneckerNormal):
    """A user's prior: z_a − ρ z_{a−1} independent along the raster, ρ learned."""

    name: ClassVar[str] = "smooth"

    @property
    def shapes(self):
        return super().shapes | {"rho": ()}

    def space_whitening(self, params):
        locations = self.height * self.width
        return jnp.eye(locations) - params["rho"] * jnp.eye(locations, k=-1)

    def maps_whitening(self, params):
        return jnp.eye(self.maps)


def test_a_users_prior_is_its_two_factors():
    post, prior = POSTERIORS["naive"], Smooth(**SIZES)
    assert isinstance(prior, latents.Prior)
    assert prior.num_params == 13
    q_params, params = random_params(post, (2,)), random_prior_params(prior)
    dense = prior_of(post, "matrix_normal")
    space = jnp.zeros((6, 6)).at[jnp.arange(1, 6), jnp.arange(5)].set(-params["rho"])
    same = {"mean": params["mean"], "space": space[np.tril_indices(6)], "maps": jnp.zeros(3)}
    for found, expected in zip(
        terms(prior, post, q_params, params), terms(dense, post, q_params, same), strict=True
    ):
        np.testing.assert_allclose(found, expected, **TIGHT)
    np.testing.assert_allclose(
        prior.sample(KEY, params, (2,)), dense.sample(KEY, same, (2,)), **TIGHT
    )


# Gradients and laws.


@pytest.mark.parametrize(
    ("post", "name"),
    [(POSTERIORS["lowrank"], "matrix_normal"), (POSTERIORS["mvn_full"], "tensor_normal")],
    ids=["lowrank", "mvn_full"],
)
def test_gradients_are_the_numerical_ones_and_finite_at_the_start(post, name):
    prior = prior_of(post, name)
    z, weights = jax.random.normal(KEY, (2, post.height, post.width, post.maps))
    flat, unravel = ravel_pytree((random_params(post), random_prior_params(prior)))

    @jax.jit
    def total(flat):
        q_params, params = unravel(flat)
        per_map, per_location = terms(prior, post, q_params, params)
        kl = per_map @ weights[0, 0] + jnp.vdot(per_location, weights[..., 0])
        sample = prior.sample(KEY, params, ())
        return kl + prior.log_prob(params, z) + jnp.vdot(sample, weights)

    gradient = jax.jit(jax.grad(total))
    steps = 1e-5 * jnp.eye(flat.size)
    ahead, behind = (jax.vmap(total)(flat + sign * steps) for sign in (1, -1))
    np.testing.assert_allclose(gradient(flat), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(np.asarray(gradient(jnp.zeros_like(flat)))))


def diagonal_of(size):
    """Where the diagonal stands in a flat triangle."""
    rows, cols = np.tril_indices(size)
    return jnp.asarray(rows == cols, float)


@pytest.mark.parametrize(
    ("name", "factor", "size"),
    [("tensor_normal", "rows", 3), ("tensor_normal", "cols", 2), ("matrix_normal", "space", 6)],
)
@laws
@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_the_scale_of_a_space_factor_changes_nothing(name, factor, size, seed, shift):
    post = POSTERIORS["mvn_full"]
    prior = prior_of(post, name)
    params = random_prior_params(prior, seed=seed)
    shifted = params | {factor: params[factor] + shift * diagonal_of(size)}
    q_params = random_params(post, seed=seed)
    for one, other in zip(
        terms(prior, post, q_params, params), terms(prior, post, q_params, shifted), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@one_of_each_name
@every_learned_prior
@laws
@given(seed=st.integers(0, 1000))
def test_no_term_is_negative(post, name, seed):
    """By map always; by location where the posterior's entries are independent."""
    prior = prior_of(post, name)
    per_map, per_location = terms(
        prior, post, random_params(post, seed=seed), random_prior_params(prior, seed=seed + 1)
    )
    assert np.all(np.asarray(per_map) >= 0)
    if "full" not in post.name:
        assert np.all(np.asarray(per_location) >= 0)


@pytest.mark.parametrize("name", ["naive", "mvn_full"])
def test_matrix_normal_holds_tensor_normal(name):
    post = POSTERIORS[name]
    tensor, matrix = prior_of(post, "tensor_normal"), prior_of(post, "matrix_normal")
    params, q_params = random_prior_params(tensor), random_params(post, (2,))
    space = np.array(tensor.space_whitening(params))
    np.fill_diagonal(space, np.log(np.diag(space)))
    same = {
        "mean": params["mean"],
        "maps": params["maps"],
        "space": jnp.asarray(space[np.tril_indices(6)]),
    }
    for one, other in zip(
        terms(tensor, post, q_params, params), terms(matrix, post, q_params, same), strict=True
    ):
        np.testing.assert_allclose(one, other, **TIGHT)


# The table.


@every_learned_prior
def test_the_most_likely_parameters_for_moments_recover_the_priors_own(name):
    prior = latents.make_prior(name, **SIZES)
    params = random_prior_params(prior, seed=3)
    mean, whitening = dense_prior(prior, params)
    covariance = np.linalg.inv(whitening.T @ whitening)
    found = prior.of_moments(np.asarray(mean).reshape(3, 2, 2), covariance)
    again = dense_prior(prior, {k: v.astype(jnp.float64) for k, v in found.items()})
    np.testing.assert_allclose(again[0], mean, rtol=1e-6)
    np.testing.assert_allclose(again[1], whitening, rtol=1e-5, atol=1e-6)


@every_learned_prior
def test_no_parameters_nearby_are_more_likely_for_moments_of_another_form(name):
    prior = latents.make_prior(name, **SIZES)
    root = np.random.default_rng(0).standard_normal((12, 12))
    mean, covariance = np.ones((3, 2, 2)), root @ root.T + np.eye(12)
    found = prior.of_moments(mean, covariance)

    def loss(flat):
        """The cross-entropy of a Gaussian of these moments, without its constant."""
        _, whitening = dense_prior(prior, unravel(flat))
        trace = np.trace(whitening @ covariance @ whitening.T)
        return 0.5 * trace - np.log(np.diag(whitening)).sum()

    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), found))
    best = loss(flat)
    assert best < loss(jnp.zeros_like(flat)) - 1  # the identity
    for seed in range(20):
        step = 1e-2 * np.random.default_rng(seed).standard_normal(flat.size)
        assert loss(flat + step) > best - 1e-7


def test_names():
    assert latents.prior_names() == ("standard", *LEARNED)
    for name in latents.prior_names():
        prior = latents.make_prior(name, **SIZES)
        assert prior.name == name
        assert isinstance(prior, latents.Prior)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("standard", {}),
        ("tensor_normal", {"mean": (3, 4, 5), "rows": (6,), "cols": (10,), "maps": (15,)}),
        ("matrix_normal", {"mean": (3, 4, 5), "space": (78,), "maps": (15,)}),
    ],
)
def test_shapes(name, expected):
    prior = latents.make_prior(name, height=3, width=4, maps=5)
    assert prior.shapes == expected
    assert {key: leaf.shape for key, leaf in prior.initial().items()} == expected
    assert prior.num_params == sum(int(np.prod(shape)) for shape in expected.values())


def test_tensor_normal_of_8x8x8_has_620_parameters():
    assert latents.make_prior("tensor_normal", height=8, width=8, maps=8).num_params == 620


def test_priors_are_equal_by_sizes_and_name():
    every = [latents.make_prior(name, **SIZES) for name in latents.prior_names()]
    again = [latents.make_prior(name, **SIZES) for name in latents.prior_names()]
    assert every == again
    assert len({*every, *again, latents.make_prior("standard", **(SIZES | {"maps": 3}))}) == 5


def assert_refused(message, name="tensor_normal", **sizes):
    # Unwrapped: these tests check types at run time, and users' calls do not.
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the whole line is compared)
        inspect.unwrap(latents.make_prior)(name, **(SIZES | sizes))
    assert str(refusal.value) == message


def test_unknown_name_is_refused_with_those_there_are():
    assert_refused(
        "name must be one of standard, tensor_normal, matrix_normal, "
        "autoregressive, got name='normal'",
        name="normal",
    )


@every_prior
@pytest.mark.parametrize("argument", ["height", "width", "maps"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "3", None])
def test_sizes_must_be_positive_integers(name, argument, value):
    message = f"{argument} must be a positive integer, got {argument}={value!r}"
    assert_refused(message, name=name, **{argument: value})


@every_prior
def test_other_sizes_are_refused(name):
    prior = latents.make_prior(name, height=2, width=3, maps=2)
    post, params = POSTERIORS["naive"], prior.initial()
    message = r"posterior must have .* maps \(2, 3, 2\), got \(3, 2, 2\)"
    for method in (prior.kl_per_map, prior.kl_per_location):
        with pytest.raises(ValueError, match=message):
            method(post, random_params(post), params)
    with pytest.raises(ValueError, match=r"z must end in .* \(2, 3, 2\), got shape \(4, 3, 2, 2\)"):
        prior.log_prob(params, jnp.zeros((4, 3, 2, 2)))
