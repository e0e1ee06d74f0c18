"""Runs that start at probabilistic PCA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import svae_jax
from svae_jax import latents
from svae_jax.errors import UserError
from svae_jax.evaluation import closed_forms
from svae_jax.model import SpatialVAE
from svae_jax.model.linear import LinearPath
from svae_jax.training import job as jobs
from svae_jax.training import loop, start, step


@pytest.fixture
def config(tiny_config):
    """Four maps of 2×2 with patches of 4×4, beside networks."""
    tiny_config.latent.update(name="mvn", height=2, width=2, maps=4)
    tiny_config.model.update(decoder="3x3/24 3x3/16 3x3/image", linear="pca")
    return tiny_config


@pytest.fixture
def closed_form(config):
    """PCA itself, after no step."""
    config.model.update(encoder="none", decoder="none")
    config.update(num_steps=0, importance_samples=1)
    return config


def test_a_closed_form_is_a_run_of_no_steps(closed_form, tmp_path):
    result = loop.train(closed_form, tmp_path / "run")
    assert result["step"] == 0
    metrics = result["metrics"]
    assert metrics["eval/elbo"] == pytest.approx(metrics["eval/elbo_iw"], rel=0.05)
    (row,) = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "eval/elbo_iw" not in line
    ]
    assert row["step"] == 0
    run = svae_jax.load(tmp_path / "run")
    assert run.step == 0
    assert run.reconstruct(run.images()[:2]).shape == (2, 8, 8, 3)
    assert (tmp_path / "run" / "reconstructions" / "000000.png").exists()
    assert loop.train(closed_form, tmp_path / "run") == result
    (tmp_path / "run" / "result.json").unlink()  # killed before it was written
    again = loop.train(closed_form, tmp_path / "run")
    assert again["metrics"] == metrics


def test_training_from_pca_beats_it(config, closed_form, tmp_path):
    floor = loop.train(closed_form, tmp_path / "pca")["metrics"]["eval/elbo"]
    closed_form.model.update(
        encoder="3x3/4/s2 3x3/8/s2", decoder="3x3/24 3x3/16 3x3/image", norm="none"
    )
    closed_form.update(num_steps=40, eval_every=40)
    trained = loop.train(closed_form, tmp_path / "trained")["metrics"]["eval/elbo"]
    assert trained > floor


def test_a_resumed_run_ends_in_the_same_bits_and_does_not_fit_again(config, tmp_path, monkeypatch):
    config.optimizer.ema_decay = 0.9
    loop.train(config, tmp_path / "whole")
    config.num_steps = 4
    loop.train(config, tmp_path / "parts")
    monkeypatch.setattr(closed_forms, "fit", lambda *_: pytest.fail("it fits again"))
    config.num_steps = 8
    loop.train(config, tmp_path / "parts")
    whole, parts = (svae_jax.load(tmp_path / name).variables for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def _state(config, tmp_path):
    job = jobs.prepare(config, tmp_path / "job")
    return job, start.initial(job, step.init_state(job.recipe))


def test_the_statistics_move_from_the_first_step(config, tmp_path):
    job, state = _state(config, tmp_path)
    pixels = jnp.asarray(job.train_images[:12])
    after, scalars = step.train_step(job.recipe, state, pixels)
    assert float(scalars["skipped"][0]) == 0

    def moved(name):
        changes = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)), state.batch_stats[name], after.batch_stats[name]
        )
        return jax.tree.leaves(changes)

    assert all(moved("encoder"))
    assert all(moved("decoder"))


def test_the_average_starts_at_pca_too(config, tmp_path):
    config.optimizer.ema_decay = 0.9
    _, state = _state(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema["params"])


@pytest.mark.parametrize("prior", ["tensor_normal", "matrix_normal"])
def test_a_learned_prior_starts_at_the_moments_of_the_posteriors(config, tmp_path, prior):
    """It costs less than the standard prior, and more than nothing."""
    config.latent.prior = prior
    job, state = _state(config, tmp_path)
    model = job.recipe.model
    images = model.pixels.to_float(jnp.asarray(job.train_images))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    params = model.apply(variables, images, method="encode")
    learned = model.apply(variables, params, method="kl_per_map").sum(axis=1).mean()
    standard = model.posterior.kl(params).mean()
    assert 0 < learned < standard - 1
    mean = model.posterior.mean(params).mean(axis=0)
    np.testing.assert_allclose(state.params["prior"]["mean"], mean, atol=1e-3)


def test_a_learned_sigma_starts_at_pcas(config, tmp_path):
    config.objective.sigma = "learned"
    job, state = _state(config, tmp_path)
    found = closed_forms.fit(job.recipe.model.linear, job.recipe.likelihood, job.train_images)
    assert float(jnp.exp(state.params["log_sigma"])) == pytest.approx(found.sigma, rel=1e-5)


def test_learned_sigmas_of_several_directions_start_at_the_residuals(config, tmp_path):
    config.objective.update(sigma="learned", likelihood="gaussian_blocks")
    job, state = _state(config, tmp_path)
    model = job.recipe.model
    images = model.pixels.to_float(jnp.asarray(job.train_images))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs = model.apply(variables, jax.random.key(5), images).outputs
    error = np.asarray(model.likelihood.error(images, outputs)).mean(0)
    expected = np.sqrt(error / 16)  # blocks of 2×2 in 8×8 pixels
    np.testing.assert_allclose(jnp.exp(state.params["log_sigma"]), expected, rtol=0.2)
    assert expected.max() / expected.min() > 1.5


def test_warm_up_of_beta_and_few_images_are_told(config, tmp_path, caplog):
    config.objective.beta_warmup_steps = 5
    config.dataset.split = "train[:12]"
    config.latent.update(name="vector", height=1, width=1, maps=20)
    config.model.update(encoder="none", decoder="none", parity_maps=1)
    _state(config, tmp_path)
    assert any("beta_warmup_steps=5" in line for line in caplog.messages)
    assert any("PCA has 11 components for 20 maps" in line for line in caplog.messages)


def test_networks_of_ones_own_need_a_path_and_cannot_start_at_pca(config, tmp_path):
    posterior = latents.make("mvn", height=2, width=2, maps=4)
    from flax import linen as nn

    own = SpatialVAE(posterior, nn.Dense(3), nn.Dense(3))
    with pytest.raises(UserError, match=r"model.linear='pca': .* give it one"):
        loop.train(config, tmp_path / "run", own)
    own = own.clone(linear=LinearPath((8, 8, 3), 2, 2, 4, (4, 4)))
    job = jobs.prepare(config, tmp_path / "job")
    recipe = job.recipe._replace(model=own.clone(likelihood=job.recipe.likelihood))
    with pytest.raises(UserError, match="only the package's own networks can start at PCA"):
        start.initial(job._replace(recipe=recipe), step.init_state(job.recipe))


def test_an_unknown_start_is_refused(config, tmp_path):
    config.model.linear = "ica"
    with pytest.raises(UserError, match=r"model.linear must be one of .*, got .ica."):
        loop.train(config, tmp_path / "run")


def test_a_random_path_trains(config, tmp_path):
    config.model.linear = "random"
    config.num_steps = 2
    assert np.isfinite(loop.train(config, tmp_path / "run")["metrics"]["eval/elbo"])
