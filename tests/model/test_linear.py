"""The linear path, and probabilistic PCA in closed form, against scikit-learn and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from flax import linen as nn
from sklearn import decomposition

from svae_jax import config as configs
from svae_jax import latents, likelihoods
from svae_jax import model as models
from svae_jax.evaluation import steps
from svae_jax.model import SpatialVAE, linear
from svae_jax.model.layers import Style
from svae_jax.model.linear import LinearPath

SHAPE = (8, 8, 3)
MIN_SIGMA = 1e-3


def _images(count, shape=SHAPE, seed=0):
    """Smooth images with noise, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-0.8, 0.8, (count, 2, 2, shape[2])).repeat(shape[0] // 2, 1)
    return coarse.repeat(shape[1] // 2, 2) + rng.normal(0, 0.05, (count, *shape))


def _fit(path, images):
    return linear.pca(path, linear.moments(path, np.array_split(images, 3)), MIN_SIGMA)


def test_it_is_scikit_learns_pca(x64):
    """Of patches; scikit-learn divides by n − 1, maximum likelihood by n."""
    path, images = LinearPath(SHAPE, 2, 2, 5, (4, 4)), _images(200)
    found = _fit(path, images)
    patches = np.asarray(path.patches(jnp.asarray(images))).reshape(-1, 48)
    theirs = decomposition.PCA(5).fit(patches)
    share = (len(patches) - 1) / len(patches)
    eigenvalues = theirs.explained_variance_ * share
    sigma2 = theirs.noise_variance_ * share
    np.testing.assert_allclose(found.sigma**2, sigma2, rtol=1e-10)
    np.testing.assert_allclose(found.patch_bias, theirs.mean_, atol=1e-12)
    directions = found.to_patch / np.linalg.norm(found.to_patch, axis=1, keepdims=True)
    signs = np.sign(np.sum(directions * theirs.components_, axis=1))
    np.testing.assert_allclose(directions, signs[:, None] * theirs.components_, atol=1e-8)
    np.testing.assert_allclose(found.variances, sigma2 / eigenvalues, rtol=1e-9)
    norms = np.linalg.norm(found.to_patch, axis=1) ** 2
    np.testing.assert_allclose(norms, eigenvalues - sigma2, rtol=1e-9)
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    assert (largest > 0).all()


def _log_prob(path, found, images):
    """log p(x) under probabilistic PCA, by SciPy's dense Gaussian of the patches."""
    patches = np.asarray(path.patches(jnp.asarray(images)), np.float64)
    covariance = found.to_patch.T @ found.to_patch + found.sigma**2 * np.eye(path.patch_size)
    normal = scipy.stats.multivariate_normal(found.patch_bias, covariance)
    return normal.logpdf(patches).reshape(len(images), -1).sum(axis=1)


def _config(name, **options):
    config = configs.base()
    config.dataset.update(height=8, width=8, channels=3)
    config.latent.update(name=name, height=2, width=2, maps=4)
    config.model.update(encoder="none", decoder="none", linear="pca")
    config.objective.sigma = "learned"
    for field, value in options.items():
        section, _, key = field.rpartition("__")
        (config[section] if section else config)[key] = value
    return config


_init = jax.jit(models.init, static_argnums=(0, 2))


def _encode(model, variables, images):
    return jax.jit(functools.partial(model.apply, method="encode"))(variables, images)


def _at_pca(config, images):
    """The model, its variables at PCA, and the PCA."""
    model = configs.model(config)
    # Beside so small a decoder, patches would be of one pixel.
    model = model.clone(linear=model.linear.clone(patch=(4, 4)))
    variables = _init(model, jax.random.key(0), model.likelihood.image_shape)
    found = _fit(model.linear, images)
    params = models.start_at_pca(model, variables["params"], found)
    return model, {**variables, "params": params}, found


NETWORKS = {"model__encoder": "3x3/4/s2", "model__decoder": "3x3/4 3x3/4 3x3/image"}


@pytest.mark.parametrize("name", ["naive", "mvn", "mvn_full"])
@pytest.mark.parametrize("options", [{}, NETWORKS], ids=["alone", "with networks"])
def test_every_log_weight_is_the_exact_likelihood(name, options):
    """The posterior is exact, so no sample of it differs from log p(x)."""
    pixels = np.clip(np.round((_images(400) + 1) * 127.5), 0, 255).astype(np.uint8)
    images = np.asarray((pixels - 127.5) / 127.5, np.float32)
    model, variables, found = _at_pca(_config(name, **options), images)
    scale = np.exp(np.asarray(variables["params"]["log_sigma"]))
    for seed in range(3):
        actual = steps.importance_weighted_step(
            model, variables, jax.random.key(seed), jnp.asarray(pixels[:20]), scale, 1, 1
        )
        expected = _log_prob(model.linear, found, images[:20])
        np.testing.assert_allclose(actual["density"], expected, rtol=1e-5)


def test_a_low_rank_mean_of_full_rank_starts_as_mvn():
    images = _images(300).astype(np.float32)
    low = _config("lowrank", latent__rank=2, **NETWORKS)
    z = []
    for config in (low, _config("mvn", **NETWORKS)):
        model, variables, _ = _at_pca(config, images)
        params = _encode(model, variables, images[:5])
        z.append((model.posterior.mean(params), model.posterior.stddev(params)))
    for ours, theirs in zip(*z, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_low_rank_mean_starts_at_its_part_of_lowest_frequency():
    images = _images(300).astype(np.float32)
    model, variables, found = _at_pca(_config("lowrank", **NETWORKS), images)
    params = _encode(model, variables, images[:5])
    patches = np.asarray(model.linear.patches(jnp.asarray(images[:5])))
    full = patches @ found.to_mean + found.mean_bias
    expected = np.broadcast_to(full.mean(axis=2, keepdims=True), full.shape)  # over columns
    np.testing.assert_allclose(model.posterior.mean(params), expected, atol=1e-4)


def test_patches_and_images_are_inverse_where_the_small_image_is_the_image():
    path = LinearPath((6, 8, 2), 3, 2, 4, (2, 4))
    images = jax.random.normal(jax.random.key(0), (5, 6, 8, 2))
    np.testing.assert_array_equal(path.image(path.patches(images)), images)
    first = np.asarray(path.patches(images))[1, 2, 1].reshape(2, 4, 2)
    np.testing.assert_array_equal(first, images[1, 4:6, 4:8])


def test_a_smaller_image_is_the_closest_one_and_grows_bilinearly():
    path = LinearPath((9, 9, 1), 2, 2, 4, (3, 3))  # from 6×6
    small = jax.random.normal(jax.random.key(0), (3, 2, 2, 9))
    np.testing.assert_allclose(path.patches(path.image(small)), small, atol=1e-4)
    image = np.random.default_rng(1).normal(size=(9, 9))  # no interpolation gives it
    units = jnp.eye(36).reshape(36, 2, 2, 9)
    design = np.asarray(path.image(units)).reshape(36, 81).T
    weights, *_ = np.linalg.lstsq(design, image.ravel(), rcond=None)
    closest = path.image(path.patches(jnp.asarray(image[..., None])))
    np.testing.assert_allclose(np.ravel(closest), design @ weights, atol=1e-4)
    rows = linear.interpolation(6, 9)
    np.testing.assert_allclose(rows.sum(axis=1), 1)
    np.testing.assert_allclose(
        rows[1:-1] @ (np.arange(6) + 0.5) / 6, (np.arange(9)[1:-1] + 0.5) / 9
    )


@pytest.mark.parametrize("name", ["vector", "mvn"])
def test_what_a_smaller_image_lacks_counts_as_noise(name):
    """At the start, σ is near the root mean squared error of the model's samples."""
    images = _images(500, (12, 12, 1)).astype(np.float32)
    config = _config(name, dataset__height=12, dataset__width=12, dataset__channels=1)
    size = {"vector": (1, 1, 6), "mvn": (3, 3, 2)}[name]
    config.latent.update(height=size[0], width=size[1], maps=size[2])
    if name == "vector":
        config.model.parity_maps = 1
    model = configs.model(config)
    path = model.linear.clone(patch=(3, 3) if name == "vector" else (2, 2))
    model = model.clone(linear=path)
    variables = _init(model, jax.random.key(0), (12, 12, 1))
    found = _fit(path, images)
    variables["params"] = models.start_at_pca(model, variables["params"], found)
    outputs = jax.jit(model.apply)(variables, jax.random.key(1), images).outputs
    error = float(jnp.sqrt(jnp.mean((outputs - images) ** 2)))
    assert error == pytest.approx(found.sigma, rel=0.1)


@pytest.mark.parametrize("size", [8, 32])
def test_no_other_variances_of_the_maps_have_a_higher_elbo(size):
    """Patches of 3×3 maps are those of a smaller image, whose directions differ in their gain."""
    rng = np.random.default_rng(3)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(400, size, size, 3)), (0, 1, 1, 0))
    images = (smooth / smooth.std() / 4 + rng.normal(0, 0.02, smooth.shape)).astype(np.float32)
    config = _config("naive", dataset__height=size, dataset__width=size)
    config.latent.update(height=3, width=3, maps=8)
    path = LinearPath((size, size, 3), 3, 3, 8, (size // 3, size // 3))
    model = configs.model(config).clone(linear=path)
    variables = _init(model, jax.random.key(0), (size, size, 3))
    variables["params"] = models.start_at_pca(model, variables["params"], _fit(path, images))

    images = jnp.asarray(images)

    @jax.jit
    def elbo(log_factors):
        params = model.apply(variables, images, method="encode")
        params = params | {"log_variance": params["log_variance"] + log_factors}
        z = model.posterior.sample(jax.random.key(1), params)
        outputs = model.apply(variables, z, method="decode")
        scale = jnp.exp(variables["params"]["log_sigma"])
        log_prob = model.likelihood.log_prob(scale, images, outputs)
        return jnp.mean(log_prob - model.posterior.kl(params))

    ours = elbo(jnp.zeros(8))
    for factor in (0.8, 0.9, 1.1, 1.25):
        for k in range(8):
            assert elbo(jnp.zeros(8).at[k].set(np.log(factor))) < ours + 0.1, (factor, k)


def test_patches_are_as_large_as_their_share_of_the_decoder_allows():
    assert linear.patch_for((32, 32, 3), 8, 8, 8, 27_500.0) == (4, 4)
    assert linear.patch_for((32, 32, 3), 3, 3, 128, 27_500.0) == (8, 8)
    assert linear.patch_for((32, 32, 3), 1, 1, 150, 27_500.0) == (7, 7)
    assert linear.patch_for((32, 32, 3), 8, 8, 8, 432.0) == (4, 4)  # biases count
    assert linear.patch_for((32, 32, 3), 8, 8, 8, 431.0) == (3, 3)
    with pytest.raises(ValueError, match="300 maps need 903 weights and biases at"):
        linear.patch_for((32, 32, 3), 8, 8, 300, 800.0)
    with pytest.raises(ValueError, match="9x9 cells are more than"):
        linear.patch_for((8, 8, 3), 9, 9, 1, 800.0)


def test_few_images_and_constant_channels_give_white_noise_in_the_other_maps():
    path = LinearPath(SHAPE, 1, 1, 10, (8, 8))
    images = _images(4)
    images[..., 2] = 0.5
    found = _fit(path, images)
    assert found.num_components == 3
    np.testing.assert_array_equal(found.variances[3:], 1)
    np.testing.assert_array_equal(found.to_patch[3:], 0)
    assert found.sigma == MIN_SIGMA
    assert np.isfinite(found.to_mean).all()
    many = _images(40, (2, 2, 3))
    many[..., 2] = 0.5
    assert _fit(LinearPath((2, 2, 3), 1, 1, 10, (2, 2)), many).num_components == 8


def test_a_models_own_kind_of_network_cannot_start_at_pca():
    images = _images(50).astype(np.float32)
    model, variables, found = _at_pca(_config("mvn", **NETWORKS), images)
    for part in ("encoder", "decoder"):
        own = model.clone(**{part: nn.Dense(3)})
        with pytest.raises(ValueError, match=f"only the package's own .* the {part} is a Dense;"):
            models.start_at_pca(own, variables["params"], found)


def test_a_path_has_the_sizes_of_the_posterior():
    posterior = latents.make("mvn", height=2, width=2, maps=4)
    path = LinearPath(SHAPE, 2, 2, 5, (4, 4))
    with pytest.raises(ValueError, match="posterior's 2x2 cells and 4 maps, got 2x2 and 5"):
        SpatialVAE(posterior, nn.Dense(3), nn.Dense(3), linear=path)


def test_a_likelihood_of_logits_has_no_linear_path_but_one_of_pixels():
    posterior = latents.make("mvn", height=2, width=2, maps=2)
    prior = latents.make_prior("standard", height=2, width=2, maps=2)
    p_x = likelihoods.make("gaussian", image_shape=SHAPE)
    stacks = {"encoder": "none", "decoder": "none", "style": Style()}
    with pytest.raises(ValueError, match=r"encoder: 'none' goes with .* a linear path"):
        models.make(posterior, p_x, prior=prior, **stacks)
    model = models.make(posterior, p_x, prior=prior, has_linear_path=True, **stacks)
    assert model.linear.patch == (4, 4)
    binary = likelihoods.make(
        "bernoulli", image_shape=SHAPE, pixels=likelihoods.default_pixels("bernoulli")
    )
    with pytest.raises(ValueError, match="linear: the outputs of Bernoulli are not means"):
        models.make(posterior, binary, prior=prior, has_linear_path=True, **stacks)


def test_every_learned_scale_starts_at_the_standard_deviation_of_pca():
    images = _images(300).astype(np.float32)
    for name, unit in (("laplace", 2**-0.5), ("discretized_logistic", 3**0.5 / np.pi)):
        config = _config("mvn", objective__likelihood=name)
        _, variables, found = _at_pca(config, images)
        scale = np.exp(variables["params"]["log_sigma"])
        assert scale == pytest.approx(found.sigma * unit, rel=1e-5)
