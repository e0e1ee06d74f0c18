"""Linear floors: against scikit-learn's probabilistic PCA and SciPy's multivariate normal."""

import numpy as np
import pytest
from flax import linen as nn
from scipy import stats
from sklearn.decomposition import PCA as SklearnPCA

from svae_jax import config as configs
from svae_jax import latents, likelihoods
from svae_jax.devices import sharding
from svae_jax.evaluation import closed_forms
from svae_jax.model import SpatialVAE
from svae_jax.model.linear import LinearPath
from tests import tiny

COUNT = 3000  # more than a fitted σ is of


def smooth(seed, count):
    """Correlated pictures, uint8 [count, 4, 4, 3], whose rounding is small beside their noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(48, 48)) * np.geomspace(1, 0.2, 48)
    values = 128 + 7 * rng.normal(size=(count, 48)) @ mixing.T
    return values.clip(0, 255).astype(np.uint8).reshape(count, 4, 4, 3)


@pytest.fixture(scope="module")
def floors():
    config = tiny.config("", "")
    config.dataset.update(height=4, width=4)
    config.latent.update(name="mvn", height=2, width=2, maps=3)
    config.model.update(encoder="none", decoder="none", linear="pca")
    config.batch_size = 100
    recipe = configs.recipe(config, 10)
    mesh = sharding.make_mesh()
    return closed_forms.floors(recipe, smooth(0, COUNT), smooth(1, 300), mesh, 700)


def floats(pixels):
    return (pixels.reshape(len(pixels), -1) - 127.5) / 127.5


def test_they_are_the_log_likelihoods_of_scikit_learns_pca(floors):
    for name, components in (("as many latents", 12), ("as large a decoder", 13)):
        reference = SklearnPCA(components, svd_solver="full").fit(floats(smooth(0, COUNT)))
        expected = reference.score(floats(smooth(1, 300)))
        assert floors[name].components == components
        assert floors[name].elbo.value == pytest.approx(expected, abs=0.2)
        assert floors[name].elbo.standard_error < 1


def test_patches_share_one_basis(floors):
    found = floors["same latent"]
    assert found[:4] == (2, 2, 3, 4 * 12)
    patches = [
        pixels.reshape(-1, 2, 2, 2, 2, 3).swapaxes(2, 3).reshape(-1, 12)
        for pixels in (smooth(0, COUNT), smooth(1, 300))
    ]
    reference = SklearnPCA(3, svd_solver="full").fit(floats(patches[0]))
    assert found.elbo.value == pytest.approx(4 * reference.score(floats(patches[1])), abs=0.2)


def test_all_components_are_the_gaussian_of_the_pixels(floors):
    training = floats(smooth(0, COUNT))
    gaussian = stats.multivariate_normal(training.mean(0), np.cov(training.T, bias=True))
    expected = gaussian.logpdf(floats(smooth(1, 300))).mean()
    assert floors["Gaussian of the pixels"].elbo.value == pytest.approx(expected, abs=0.3)
    bits = floors["Gaussian of the pixels"].bits_per_dim.value
    # Bins are not much narrower than the least of the 48 standard deviations.
    assert bits == pytest.approx((48 * np.log(127.5) - expected) / (48 * np.log(2)), abs=0.1)


def test_patches_of_a_smaller_image_are_reported(capsys):
    recipe = configs.recipe(tiny.config("", ""), 10)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    for cells, patch, line in (
        (3, (2, 2), "PCA of 2x2 patches of 3 training images, shrunk to 6x6\n"),
        (2, (4, 4), "PCA of 4x4 patches of 3 training images\n"),
    ):
        path = LinearPath((8, 8, 3), cells, cells, 2, patch)
        closed_forms.moments(path, recipe.likelihood, images)
        assert capsys.readouterr().err == line


def test_images_too_large_for_a_covariance_are_cut_into_patches():
    assert closed_forms._cells((32, 32, 3)) == (1, 1)
    assert closed_forms._cells((64, 64, 3)) == (2, 2)
    assert closed_forms._cells((40, 96, 5)) == (5, 1)


def _names(model, shape, decoder_params):
    noise = likelihoods.make("gaussian", image_shape=shape)
    paths = closed_forms._paths(model, noise, decoder_params)
    return {name: (p.height, p.width, p.maps) for name, p in paths.items()}


def _model(name, height, width, maps):
    posterior = latents.make(name, height=height, width=width, maps=maps)
    return SpatialVAE(posterior, nn.Dense(1), nn.Dense(1))


def test_each_floor_stands_once_and_only_where_there_is_one():
    assert _names(_model("vector", 1, 1, 5), (4, 4, 3), 480) == {
        "same latent": (1, 1, 5),
        "as large a decoder": (1, 1, 9),
        "Gaussian of the pixels": (1, 1, 47),
    }
    assert _names(_model("mvn", 8, 8, 2), (4, 4, 3), 0) == {  # 8×8 cells are more than pixels
        "as many latents": (1, 1, 47),
    }
    assert _names(_model("mvn", 3, 3, 300), (8, 8, 3), 0)["same latent"] == (3, 3, 11)
    assert _names(_model("mvn", 8, 8, 3), (64, 64, 3), 0) == {
        "same latent": (8, 8, 3),
        "as many latents": (2, 2, 48),
        "Gaussian of patches": (2, 2, 3071),
    }


def test_mirrored_images_count_where_training_flips_them():
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    path = LinearPath((8, 8, 3), 2, 2, 4, (4, 4))
    noise = likelihoods.make("gaussian", image_shape=(8, 8, 3))
    flipped = closed_forms.moments(path, noise, images, flip=True)
    both = closed_forms.moments(path, noise, np.concatenate([images, images[:, :, ::-1]]))
    np.testing.assert_allclose(flipped.eigenvalues, both.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(flipped.mean, both.mean, atol=1e-12)


def test_a_likelihood_without_an_optimal_scale_has_no_floors():
    config = tiny.config("", "")
    config.objective.update(likelihood="discretized_logistic", sigma="learned")
    recipe = configs.recipe(config, 10)
    mesh = sharding.make_mesh()
    images = np.zeros((12, 8, 8, 3), np.uint8)
    assert closed_forms.floors(recipe, images, images, mesh, 500) == {}
