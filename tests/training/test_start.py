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
from svae_jax.latents.autoregressive import Autoregressive
from svae_jax.model import SpatialVAE
from svae_jax.model.linear import LinearPath
from svae_jax.training import job as jobs
from svae_jax.training import loop, start, step


@pytest.fixture
def with_pictures(tiny_config):
    """Four maps of 2×2 with patches of 4×4, beside networks."""
    tiny_config.latent.update(name="mvn", height=2, width=2, maps=4)
    tiny_config.model.update(decoder="3x3/24 3x3/16 3x3/image", linear="pca")
    return tiny_config


@pytest.fixture
def config(with_pictures, no_pictures):
    """The same; training draws no pictures."""
    return with_pictures


@pytest.fixture
def closed_form(with_pictures):
    """PCA itself, after no step."""
    with_pictures.model.update(encoder="none", decoder="none")
    with_pictures.update(num_steps=0, importance_samples=1)
    return with_pictures


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


def test_a_closed_form_that_goes_on_keeps_its_row_and_its_pictures(closed_form, tmp_path):
    directory = tmp_path / "run"
    elbo = loop.train(closed_form, directory)["metrics"]["eval/elbo"]
    closed_form.update(num_steps=4)
    loop.train(closed_form, directory)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["eval/elbo"]) for row in rows if "eval/elbo" in row]
    assert found[0] == (0, elbo)
    assert [step for step, _ in found] == [0, 4]
    pictures = sorted(path.name for path in (directory / "reconstructions").iterdir())
    assert pictures == ["000000.png", "000004.png"]


@pytest.mark.usefixtures("no_pictures")
def test_training_from_pca_beats_it(closed_form, tmp_path):
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
    after, scalars = jax.jit(step.train_step, static_argnums=0)(job.recipe, state, pixels)
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


@pytest.mark.parametrize("prior", ["tensor_normal", "matrix_normal", "autoregressive"])
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


def test_a_learned_prior_of_too_many_latents_starts_at_the_standard_one(
    config, tmp_path, monkeypatch, caplog
):
    config.latent.prior = "matrix_normal"
    monkeypatch.setattr(start, "MOST_LATENTS", 15)
    _, state = _state(config, tmp_path)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in state.params["prior"].values())
    line = "latent.prior=matrix_normal starts at N(0, I): moments of 16 latents are more than"
    assert any(line in message for message in caplog.messages)
    config.latent.prior = "autoregressive"  # which needs the moments of neighbours alone
    _, state = _state(config, tmp_path)
    assert np.std(state.params["prior"]["mean"]) > 0


class NoMoments(Autoregressive):
    """A prior that takes the moments of neighbours, and no others."""

    of_moments = None


def test_the_moments_of_neighbours_are_enough_for_a_start():
    for prior in (NoMoments, Autoregressive):
        assert start._lacks_start(10**6, prior(height=2, width=2, maps=4)) == ""


def test_a_learned_sigma_starts_at_pcas(config, tmp_path):
    config.objective.sigma = "learned"
    job, state = _state(config, tmp_path)
    pca = closed_forms.fit(job.recipe.model.linear, job.recipe.likelihood, job.train_images)
    assert float(jnp.exp(state.params["log_sigma"])) == pytest.approx(pca.sigma, rel=1e-5)


def _residuals(job, state):
    """Images minus the start's outputs for one sample of z each."""
    model = job.recipe.model
    images = model.pixels.to_float(jnp.asarray(job.train_images))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs = model.apply(variables, jax.random.key(5), images).outputs
    return images, outputs


@pytest.mark.parametrize(
    ("posterior", "likelihood", "scale_of"),
    [
        ("lowrank", "gaussian", lambda d: np.sqrt(np.mean(d**2))),
        ("mvn", "laplace", lambda d: np.mean(np.abs(d))),
        ("lowrank", "discretized_logistic", lambda d: np.sqrt(3 * np.mean(d**2)) / np.pi),
    ],
)
@pytest.mark.parametrize("batch_size", [12, 1000])
def test_a_learned_scale_starts_at_the_residuals(
    config, tmp_path, posterior, likelihood, scale_of, batch_size
):
    config.batch_size = min(batch_size, 48)
    config.latent.name = posterior
    config.objective.update(sigma="learned", likelihood=likelihood)
    job, state = _state(config, tmp_path)
    # A batch of training may be larger than the images to which the scale is fitted.
    large = job._replace(recipe=job.recipe._replace(batch_size=batch_size))
    fitted = start.fit_scale(large, state.params, state.batch_stats)
    images, outputs = _residuals(job, state)
    expected = scale_of(images - outputs)
    assert float(jnp.exp(state.params["log_sigma"])) == pytest.approx(expected, rel=0.05)
    assert float(fitted) == pytest.approx(expected, rel=0.05)


def test_learned_sigmas_of_several_directions_start_at_the_residuals(config, tmp_path):
    config.objective.update(sigma="learned", likelihood="gaussian_blocks")
    job, state = _state(config, tmp_path)
    error = np.asarray(job.recipe.likelihood.error(*_residuals(job, state))).mean(0)
    expected = np.sqrt(error / 16)  # blocks of 2×2 in 8×8 pixels
    np.testing.assert_allclose(jnp.exp(state.params["log_sigma"]), expected, rtol=0.2)
    assert expected.max() / expected.min() > 1.5


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("prior", "likelihood"),
    [("standard", "gaussian_blocks"), ("matrix_normal", "gaussian"), ("tensor_normal", "gaussian")],
)
def test_richer_models_start_no_lower_than_pca(closed_form, tmp_path, prior, likelihood):
    """On the images to which all is fitted."""
    closed_form.dataset.eval_split = "train"
    closed_form.objective.sigma = "learned"
    floor = loop.train(closed_form, tmp_path / "pca")["metrics"]["eval/elbo"]
    closed_form.latent.prior = prior
    closed_form.objective.likelihood = likelihood
    assert loop.train(closed_form, tmp_path / "richer")["metrics"]["eval/elbo"] > floor


def test_a_model_starts_at_pca_of_mirrored_images_too_if_it_trains_on_them(config, tmp_path):
    config.dataset.flip = True
    config.latent.prior = "matrix_normal"
    job, state = _state(config, tmp_path)
    images = job.train_images
    both = np.concatenate([images, images[:, :, ::-1]])
    pca = closed_forms.fit(job.recipe.model.linear, job.recipe.likelihood, both)
    # Directions are symmetric or antisymmetric, and of the latter the sign is that of rounding.
    ours, theirs = np.abs(state.params["linear"]["to_patch"]), np.abs(pca.to_patch)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    model = job.recipe.model
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    params = model.apply(variables, model.pixels.to_float(jnp.asarray(both)), method="encode")
    mean = model.posterior.mean(params).mean(axis=0)
    np.testing.assert_allclose(state.params["prior"]["mean"], mean, atol=1e-3)


def test_warm_up_of_beta_and_few_images_are_reported(config, tmp_path, caplog):
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
    with pytest.raises(UserError, match=r"model.linear: only .* the encoder is a Dense; take"):
        loop.train(config, tmp_path / "run", own)
    config.dataset.value_range = "0,1"
    config.objective.likelihood = "bernoulli"
    config.model.linear = "random"
    with pytest.raises(UserError, match=r"model.linear: the outputs of Bernoulli are not means"):
        loop.train(config, tmp_path / "run", own)


def test_an_unknown_start_is_refused(config, tmp_path):
    config.model.linear = "ica"
    with pytest.raises(UserError, match=r"model.linear must be one of .*, got .ica."):
        loop.train(config, tmp_path / "run")


def test_a_random_path_trains(config, tmp_path):
    config.model.linear = "random"
    config.num_steps = 2
    assert np.isfinite(loop.train(config, tmp_path / "run")["metrics"]["eval/elbo"])
