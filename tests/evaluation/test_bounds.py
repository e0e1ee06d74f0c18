"""Held-out bounds: σ is fixed before they are taken, padding counts for nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from svae_jax import config as configs
from svae_jax import latents, likelihoods
from svae_jax import pixels as pixel_lib
from svae_jax import recipe as recipe_lib
from svae_jax.devices import sharding
from svae_jax.evaluation import bounds, steps
from svae_jax.model import SpatialVAE, networks, objective
from svae_jax.model.layers import Style
from svae_jax.training import step

NUM_PIXELS, NUM_LATENTS, NOISE = 12, 4, 0.15  # images of 2×2×3


class LinearGaussian(SpatialVAE):
    """x = Wz + b + noise, with its exact posterior; W, b and σ are its variables' `params`."""

    def setup(self):
        self.prior_params = {}

    def encode(self, images, train=False):
        p = self.variables["params"]
        covariance = 1 / (1 + jnp.sum(p["w"] ** 2, axis=0) / p["sigma"] ** 2)  # WᵀW is diagonal
        x = images.reshape(len(images), NUM_PIXELS) - p["b"]
        mean = (x @ p["w"]) * covariance / p["sigma"] ** 2
        return self.posterior.unpack(
            jnp.concatenate([mean, jnp.broadcast_to(jnp.log(covariance), mean.shape)], axis=1)
        )

    def decode(self, z, train=False):
        p = self.variables["params"]
        return (z.reshape(len(z), NUM_LATENTS) @ p["w"].T + p["b"]).reshape(-1, 2, 2, 3)


@pytest.fixture(scope="module")
def linear_gaussian():
    """A recipe, its variables, 3,000 images, and the density that they were drawn from."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((NUM_PIXELS, NUM_LATENTS)))
    w, b = q * np.array([0.2, 0.25, 0.3, 0.35]), 0.1 * rng.standard_normal(NUM_PIXELS)
    x = rng.standard_normal((3000, NUM_LATENTS)) @ w.T + b
    x = x + NOISE * rng.standard_normal(x.shape)
    pixels = np.asarray(pixel_lib.to_uint8(jnp.asarray(x))).reshape(-1, 2, 2, 3)
    density = scipy.stats.multivariate_normal(b, w @ w.T + NOISE**2 * np.eye(NUM_PIXELS))
    posterior = latents.make("naive", height=1, width=1, maps=NUM_LATENTS)
    style = Style()  # the two networks are not used
    gaussian = likelihoods.make("gaussian", image_shape=(2, 2, 3))
    unused = networks.Encoder((), posterior, style), networks.Decoder((), gaussian, style)
    model = LinearGaussian(posterior, *unused, likelihood=gaussian)
    variables = {"params": {"w": jnp.asarray(w), "b": jnp.asarray(b), "sigma": jnp.asarray(NOISE)}}
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    recipe = recipe_lib.Recipe(
        model=model,
        objective=objective.Objective(),
        optimizer=None,
        ema_decay=0.0,
        max_bad_steps=0,
        batch_size=128,
        flip=False,
        seed=0,
    )
    return recipe, variables, pixels, density


def test_sigma_is_fixed_and_refitting_it_would_exceed_the_true_likelihood(linear_gaussian):
    recipe, variables, pixels, density = linear_gaussian
    # A posterior that is somewhat off, as a trained one is.
    variables = {"params": {**variables["params"], "sigma": jnp.asarray(1.4 * NOISE)}}
    train, held_out = pixels[:2000], pixels[2000:]
    mesh = sharding.make_mesh()
    x = np.asarray(pixel_lib.UINT8.to_float(held_out), np.float64).reshape(-1, NUM_PIXELS)
    truth = density.logpdf(x)

    sigma = bounds.calibrate(recipe, variables, train, mesh)
    assert sigma == pytest.approx(NOISE, rel=0.25)
    kept = bounds.terms(recipe, variables, held_out, sigma, mesh)
    error = truth.std() / math.sqrt(len(truth))
    assert kept["elbo"] < truth.mean()
    bound = bounds.importance_weighted(recipe, variables, held_out, sigma, mesh, num_samples=20)
    assert kept["elbo"] < bound["elbo_iw"] < truth.mean()
    assert bound["bits_per_dim_iw"] < kept["bits_per_dim"]

    # What the code does not do: σ refitted to each held-out image and sample.
    outputs = recipe.model.apply(variables, jax.random.key(0), pixel_lib.UINT8.to_float(held_out))
    floats = pixel_lib.UINT8.to_float(held_out)
    own = jnp.sqrt(jnp.mean((floats - outputs.outputs) ** 2, axis=(1, 2, 3)))
    refitted = jax.vmap(recipe.likelihood.log_prob)(own, floats, outputs.outputs)
    refitted = np.mean(refitted - recipe.model.posterior.kl(outputs.params))
    assert refitted > truth.mean() + 3 * error


def test_the_bound_is_the_exact_likelihood_at_the_models_own_sigma(linear_gaussian):
    recipe, variables, pixels, density = linear_gaussian
    held_out = pixels[:50]
    x = np.asarray(pixel_lib.UINT8.to_float(held_out), np.float64).reshape(-1, NUM_PIXELS)
    bound = bounds.importance_weighted(
        recipe,
        variables,
        held_out,
        np.asarray(NOISE, np.float32),
        sharding.make_mesh(),
        num_samples=3,
    )
    # The posterior is exact, so any K will do.
    assert bound["elbo_iw"] == pytest.approx(density.logpdf(x).mean(), rel=1e-4)


def _log_other_prior(arrays, z):
    """log N(mean, variance) of each entry."""
    error = (z - arrays["mean"]) ** 2 / arrays["variance"]
    logs = -0.5 * (error + jnp.log(2 * jnp.pi * arrays["variance"]))
    return logs.sum(axis=(-3, -2, -1))


def test_bounds_under_other_priors_are_of_the_models_so_composed(linear_gaussian):
    recipe, variables, pixels, density = linear_gaussian
    held_out = pixels[:50]
    x = np.asarray(pixel_lib.UINT8.to_float(held_out), np.float64).reshape(-1, NUM_PIXELS)
    w, b = (np.asarray(variables["params"][name], np.float64) for name in ("w", "b"))
    mean, variance = np.array([0.2, -0.1, 0.3, 0.0]), np.array([0.8, 0.9, 1.1, 1.2])
    given = {"own": (0.0, 1.0), "other": (mean, variance)}
    priors = {
        name: bounds.OtherPrior(
            _log_other_prior,
            {"mean": np.float32(m) * np.ones(4, np.float32), "variance": np.float32(v)},
        )
        for name, (m, v) in given.items()
    }
    found, others = bounds.estimate_importance_weighted(
        recipe,
        variables,
        held_out,
        np.asarray(NOISE, np.float32),
        sharding.make_mesh(),
        num_samples=400,
        priors=priors,
    )
    assert others["own"]["elbo_iw"].value == pytest.approx(found["elbo_iw"].value, rel=1e-5)
    assert others["own"]["bits_per_dim_iw"].value == pytest.approx(
        found["bits_per_dim_iw"].value, rel=1e-5
    )
    composed = scipy.stats.multivariate_normal(
        b + w @ mean, w @ np.diag(variance) @ w.T + NOISE**2 * np.eye(NUM_PIXELS)
    )
    exact = composed.logpdf(x).mean()
    assert others["other"]["elbo_iw"].value == pytest.approx(exact, abs=0.005)
    # q(z|x) is the posterior under N(0, I), so the ELBO is log p(x) + E_q[log p'(z) - log p(z)].
    of_noise = 1 / (1 + np.sum(w**2, axis=0) / NOISE**2)
    means = (x - b) @ w * of_noise / NOISE**2
    log_p = -0.5 * (means**2 + of_noise)
    log_other = -0.5 * (((means - mean) ** 2 + of_noise) / variance + np.log(variance))
    elbo = (density.logpdf(x) + np.sum(log_other - log_p, axis=1)).mean()
    assert elbo < exact - 0.02
    assert others["other"]["elbo"].value == pytest.approx(elbo, abs=0.005)


def test_sigma_does_not_look_at_the_held_out_images_or_beyond_2000(linear_gaussian):
    recipe, variables, pixels, _ = linear_gaussian
    mesh = sharding.make_mesh()
    garbage = np.concatenate([pixels[:2000], 255 - pixels[:500]])
    assert bounds.calibrate(recipe, variables, garbage, mesh) == bounds.calibrate(
        recipe, variables, pixels[:2000], mesh
    )


def test_sigma_is_the_root_mean_squared_error_on_training_images(linear_gaussian):
    recipe, variables, pixels, _ = linear_gaussian
    sigma = bounds.calibrate(recipe, variables, pixels[:128], sharding.make_mesh())
    key = jax.random.fold_in(recipe_lib.stream(0, "sigma"), 0)
    floats = pixel_lib.UINT8.to_float(pixels[:128])
    means = recipe.model.apply(variables, key, floats).outputs
    assert sigma == pytest.approx(float(jnp.sqrt(jnp.mean((means - floats) ** 2))), rel=1e-5)


@pytest.mark.parametrize(("sigma", "expected"), [("0.3", 0.3), ("learned", 0.5)])
def test_given_and_learned_sigmas_are_used_as_they_are(linear_gaussian, sigma, expected):
    recipe, variables, pixels, _ = linear_gaussian
    gaussian = likelihoods.make("gaussian", image_shape=(2, 2, 3), sigma=sigma)
    recipe = recipe._replace(model=recipe.model.clone(likelihood=gaussian))
    variables = {"params": {**variables["params"], "log_sigma": jnp.log(0.5)}}
    actual = bounds.calibrate(recipe, variables, pixels, sharding.make_mesh())
    assert actual == pytest.approx(expected)


def test_released_code_is_evaluated_with_the_root_mean_squared_error(linear_gaussian):
    recipe, variables, pixels, _ = linear_gaussian
    released = recipe._replace(objective=objective.Objective(scaling="released_code"))
    mesh = sharding.make_mesh()
    assert bounds.calibrate(released, variables, pixels, mesh) == bounds.calibrate(
        recipe, variables, pixels, mesh
    )


@pytest.mark.parametrize("count", [1, 12, 29])
def test_every_image_counts_once_whatever_fills_the_last_batch(tiny_config, count):
    recipe = configs.recipe(tiny_config, 1)
    variables = step.evaluated_variables(step.init_state(recipe))
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    scale = np.asarray(0.5, np.float32)
    actual = bounds.terms(recipe, variables, pixels, scale, sharding.make_mesh())
    bits = []
    for i in range(0, count, 12):
        rows = np.minimum(np.arange(i, i + 12), count - 1)
        key = jax.random.fold_in(recipe_lib.stream(0, "eval"), i // 12)
        given = (recipe.model, variables, key, jnp.asarray(pixels[rows]), scale)
        batch = steps.eval_step(*given, ("bits_per_dim",))
        bits.extend(np.asarray(batch["bits_per_dim"])[: count - i])
    assert len(bits) == count
    assert actual["bits_per_dim"] == pytest.approx(np.mean(bits), rel=1e-5)


def test_evaluation_is_that_of_the_elbo_whatever_training_minimised(tiny_config):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    plain = configs.recipe(tiny_config, 1)
    variables = step.evaluated_variables(step.init_state(plain))
    args = (variables, pixels, pixels, sharding.make_mesh())
    expected = bounds.held_out(plain, *args)
    tiny_config.objective.update(beta=5.0, free_bits=9.0, beta_warmup_steps=7)
    assert bounds.held_out(configs.recipe(tiny_config, 1), *args) == expected
    assert expected["elbo"] == pytest.approx(expected["reconstruction"] - expected["kl"], rel=1e-5)
