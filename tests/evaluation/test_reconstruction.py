"""Reconstruction quality and the use of the latents, against scikit-image and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from svae_jax import config as configs
from svae_jax import latents, likelihoods
from svae_jax import recipe as recipe_lib
from svae_jax.devices import sharding
from svae_jax.evaluation import reconstruction, steps
from svae_jax.model import SpatialVAE, networks
from svae_jax.model.layers import Style
from svae_jax.model.vae import Outputs
from svae_jax.pixels import UINT8
from svae_jax.training import step

ONE = np.asarray(1, np.float32)  # the scale
COUNT = 29  # the last batch of 12 holds 5


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.integers(-9, 10, (COUNT, 16, 16, 3)), axis=1), axis=2)
    return np.clip(120 + smooth, 0, 255).astype(np.uint8)


def a_recipe(tiny_config, name="lowrank", rank=1):
    tiny_config.dataset.update(height=16, width=16)
    tiny_config.latent.update(name=name, rank=rank)
    tiny_config.model.update(encoder="3x3/4/s2 3x3/8/s2", decoder="3x3/6 3x3/4 3x3/4/s2 3x3/image")
    recipe = configs.recipe(tiny_config, 1)
    return recipe, step.evaluated_variables(step.init_state(recipe))


def by_batches(recipe, variables, pixels):
    """Every image's reconstruction and posterior, batch by batch."""
    outputs = []
    for i in range(0, COUNT, 12):
        rows = np.minimum(np.arange(i, i + 12), COUNT - 1)
        key = jax.random.fold_in(recipe_lib.stream(0, "eval"), i // 12)
        batch = recipe.model.apply(variables, key, UINT8.to_float(pixels[rows]))
        outputs.append(jax.tree.map(lambda x, i=i: np.asarray(x)[: COUNT - i], batch))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)


def test_errors_and_similarity_are_scikit_images(tiny_config, pixels):
    recipe, variables = a_recipe(tiny_config)
    found = reconstruction.evaluate(recipe, variables, pixels, ONE, sharding.make_mesh())[0]
    found = found["reconstruction"]
    x = np.asarray(UINT8.to_float(pixels), np.float64)
    f = by_batches(recipe, variables, pixels).outputs
    f = np.asarray(f, np.float64)
    expected = {
        "mse": [skimage.metrics.mean_squared_error(a, b) for a, b in zip(x, f, strict=True)],
        "psnr": [
            skimage.metrics.peak_signal_noise_ratio(a, b, data_range=2)
            for a, b in zip(x, f, strict=True)
        ],
        "ssim": [
            skimage.metrics.structural_similarity(
                127.5 * (a + 1), 127.5 * (b + 1), data_range=255, channel_axis=-1,
                gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            )
            for a, b in zip(x, f, strict=True)
        ],
    }  # fmt: skip
    for name, values in expected.items():
        estimate = found[name]
        assert estimate.value == pytest.approx(np.mean(values), rel=1e-5, abs=1e-5), name
        error = np.std(values, ddof=1) / np.sqrt(COUNT)
        assert estimate.standard_error == pytest.approx(error, rel=1e-3), name
    mse = np.array(expected["mse"])
    assert found["psnr_of_mse"].value == pytest.approx(10 * np.log10(4 / mse.mean()), rel=1e-6)
    # The delete-one jackknife.
    left_out = [10 * np.log10(4 / np.delete(mse, i).mean()) for i in range(COUNT)]
    jackknife = np.sqrt((COUNT - 1) * np.var(left_out))
    assert found["psnr_of_mse"].standard_error == pytest.approx(jackknife, rel=0.1)


class Perfect(SpatialVAE):
    """A model that gives its images back."""

    def setup(self):
        self.prior_params = {}

    def __call__(self, key, images, train=False):
        params = self.posterior.unpack(jnp.zeros((len(images), self.posterior.num_params)))
        return Outputs(images, params, self.posterior.mean(params), self.kl_per_map(params))


@pytest.mark.parametrize("size", [5, 6, 32])
def test_a_perfect_reconstruction_has_similarity_one_also_of_small_images(size):
    posterior, style = latents.make("naive", height=1, width=1, maps=1), Style()
    gaussian = likelihoods.make("gaussian", image_shape=(size, size, 1))
    unused = networks.Encoder((), posterior, style), networks.Decoder((), gaussian, style)
    model = Perfect(posterior, *unused, likelihood=gaussian)
    batch = np.random.default_rng(0).integers(0, 256, (3, size, size, 1)).astype(np.uint8)
    outputs = steps.eval_step(
        model, {}, jax.random.key(0), jnp.asarray(batch), 1.0, ("mse", "ssim")
    )
    np.testing.assert_allclose(outputs["ssim"], 1, rtol=1e-5)
    np.testing.assert_array_equal(outputs["mse"], 0)


def test_active_units_are_numpys(tiny_config, pixels):
    recipe, variables = a_recipe(tiny_config, "naive")
    # Spread the means around the threshold.
    variables = jax.tree.map(lambda leaf: 1.2 * leaf, variables)
    _, used = reconstruction.evaluate(recipe, variables, pixels, ONE, sharding.make_mesh())
    means = recipe.model.posterior.mean(by_batches(recipe, variables, pixels).params)
    active = np.var(np.asarray(means, np.float64), axis=0, ddof=1) > 0.01
    assert 0 < used.active_units < active.size
    assert used.active_units == active.sum()
    np.testing.assert_array_equal(used.active_per_map, active.sum(axis=(0, 1)))
    np.testing.assert_array_equal(used.active_per_location, active.sum(axis=2))


@pytest.mark.parametrize("name", ["naive", "mvn", "lowrank", "mvn_full"])
def test_kl_per_map_and_location_sum_to_the_kl(tiny_config, pixels, name):
    recipe, variables = a_recipe(tiny_config, name)
    _, used = reconstruction.evaluate(recipe, variables, pixels, ONE, sharding.make_mesh())
    posterior = recipe.model.posterior
    params = by_batches(recipe, variables, pixels).params
    kl = np.asarray(posterior.kl(params), np.float64)
    assert used.kl_per_map.sum() == pytest.approx(kl.mean(), rel=1e-5)
    total = used.kl_per_location.sum()
    if name == "mvn_full":
        assert total < kl.mean() * (1 - 1e-4)
    else:
        assert total == pytest.approx(kl.mean(), rel=1e-4)
    per_map = np.asarray(posterior.kl_per_map(params), np.float64)
    np.testing.assert_allclose(
        used.kl_per_map_error, per_map.std(axis=0, ddof=1) / np.sqrt(COUNT), rtol=1e-3
    )
