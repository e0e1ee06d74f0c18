"""What follows from the images' size: growth of the decoder, stacks, heads, and whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10, images
from svae_jax import config as configs
from svae_jax import latents, likelihoods, sizes
from svae_jax import model as models
from svae_jax.errors import UserError
from svae_jax.model import networks, stacks
from svae_jax.model.layers import Style


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [
        (2, (2, "SAME"), (2, "SAME")),
        (3, (2, "SAME"), (1, "VALID")),
        (4, (2, "SAME"), (1, "SAME")),
        (6, (1, "SAME"), (1, "VALID")),
        (8, (1, "SAME"), (1, "SAME")),
    ],
)
def test_growth_to_8_is_that_of_the_first_version(size, first, second):
    assert stacks.growth(size, 8) == (first, second)


def test_growth_reaches_every_target_within_a_ninth():
    for target in range(1, 130):
        for size in range(-(-target // 9), target + 1):
            (first, _), (second, padding) = stacks.growth(size, target)
            grown = size * first * second + (max(3 - second, 0) if padding == "VALID" else 0)
            assert target <= grown < target + size * first
            assert max(first, second) <= 3
        for size in (-(-target // 9) - 1, target + 1):
            with pytest.raises(ValueError, match=f"must be {-(-target // 9)} to {target}, got"):
                stacks.growth(size, target)


@pytest.mark.parametrize(
    ("shape", "cell"),
    [((40, 96, 5), 8), ((17, 33, 1), 4), ((16, 16, 3), 1), ((128, 100, 1), 10), ((65, 16, 3), 5)],
)
@pytest.mark.parametrize("name", ["mvn", "lowrank_full", "vector"])
def test_every_size_gives_a_model(shape, cell, name):
    config = images.get_config(f"{name},N=4" if name == "vector" else f"{name},k={cell},N=4")
    config.dataset.update(name="array", height=shape[0], width=shape[1], channels=shape[2])
    config.model.linear = "none"  # a vector's would be larger than its decoder
    configs.check(config)
    model = configs.model(config)
    posterior = model.posterior
    if name != "vector":
        expected = (-(-shape[0] // cell), -(-shape[1] // cell))
        assert (posterior.height, posterior.width) == expected
    variables = jax.eval_shape(lambda: models.init(model, jax.random.key(0), shape))
    outputs = jax.eval_shape(
        lambda v: model.apply(v, jax.random.key(0), jnp.zeros((2, *shape))), variables
    )
    assert outputs.outputs.shape == (2, *shape)


def of(height, width, arg="best", **changed):
    config = images.get_config(arg)
    config.dataset.update(name="array", height=height, width=width, channels=3)
    config.update_from_flattened_dict(changed)
    return sizes.resolved(config)


def test_what_follows_from_the_size():
    small, paper = of(32, 32, "best,k=4"), cifar10.get_config("plain")
    assert small.model.encoder == paper.model.encoder
    assert small.model.decoder == paper.model.decoder
    assert small.model.head == "dense"
    assert (small.latent.height, small.latent.width) == (8, 8)
    assert of(64, 40).model.head == "convolutional"
    assert of(63, 63).model.head == "dense"
    assert of(32, 32, "best,k=2").model.head == "convolutional"
    assert of(256, 256, "vector").model.head == "dense"
    assert of(30, 100).latent.height == 4
    assert of(30, 100).latent.width == 13
    again = sizes.resolved(small)
    assert again.to_dict() == small.to_dict()
    for name in ("lowrank", "best", "vector"):  # existing configurations stay as they are
        config = cifar10.get_config(name)
        assert sizes.resolved(config).to_dict() == config.to_dict()


def test_large_images_need_no_large_encoder():
    config = of(256, 256)
    assert config.latent.to_dict()["height"] == 32
    model = configs.model(config)
    variables = jax.eval_shape(lambda: models.init(model, jax.random.key(0), (256, 256, 3)))
    counts = models.num_params(variables["params"])
    assert counts["encoder"] < 1e6
    assert counts["decoder"] == pytest.approx(275_000, rel=0.02)


def test_images_own_configuration_needs_a_size():
    with pytest.raises(UserError, match=r"dataset.height must be at least 1, got 0"):
        configs.check(images.get_config())


def test_a_head_that_leaves_too_little_is_refused():
    config = of(64, 64, **{"model.encoder": "3x3/8/s8 3x3/8/s2"})
    with pytest.raises(UserError, match=r"model.encoder: .* leaves 4x4 features .* needs 8x8"):
        configs.check(config)


def test_more_cells_than_pixels_are_refused_with_the_sizes_that_fit():
    config = of(40, 96, **{"latent.cell": 0, "latent.height": 50, "latent.width": 12})
    message = r"latent.height must be from 1 to 40, the pixels of an image, got 50"
    with pytest.raises(UserError, match=message):
        configs.check(config)


HEADED = [name for name in latents.names() if name != "vector"]


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("axis", [1, 2])
def test_a_convolutional_head_knows_rows_and_columns(name, axis):
    """Turned features give turned arrays: those along the axis are turned, the others stay."""
    posterior = latents.make(name, height=3, width=4, maps=2)
    head = networks.Head(posterior)
    features = jax.random.normal(jax.random.key(0), (2, 6, 8, 5))
    variables = head.init(jax.random.key(1), features)
    variables = {"params": {**variables["params"], "bias": jnp.zeros(posterior.num_params)}}
    assert posterior.unpack(head.apply(variables, features)).keys() == posterior.shapes.keys()
    plain = posterior.unpack(head.apply(variables, features))
    turned = posterior.unpack(head.apply(variables, jnp.flip(features, axis)))
    for array, value in plain.items():
        axes = posterior.axes.get(array, "")
        place = axes.find("hw"[axis - 1]) + 1  # 0: the array has no such axis
        expected = jnp.flip(value, place) if place else value
        np.testing.assert_allclose(turned[array], expected, atol=1e-5, err_msg=array)
        assert jnp.std(value) > 0


def test_a_convolutional_head_averages_over_cells():
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 2)).astype(np.float32)
    thirds = networks._averaged(jnp.asarray(x), 1, 3)
    np.testing.assert_allclose(thirds, x.reshape(1, 3, 2, 5, 2).mean(2), atol=1e-6)
    halves = networks._averaged(jnp.asarray(x), 2, 2)
    first = (x[:, :, 0] + x[:, :, 1] + 0.5 * x[:, :, 2]) / 2.5
    np.testing.assert_allclose(halves[:, :, 0], first, atol=1e-6)


def test_a_decoder_crops_the_centre():
    gaussian = likelihoods.make("gaussian", image_shape=(7, 8, 1))
    layers = stacks.decoder_layers(
        "3x3/2 3x3/2 5x5/image/s2", height=2, width=4, image_size=(7, 8), num_outputs=1
    )
    whole = likelihoods.make("gaussian", image_shape=(8, 8, 1))
    z = jax.random.normal(jax.random.key(0), (1, 2, 4, 3))
    decoder = networks.Decoder(layers, gaussian, Style())
    variables = decoder.init(jax.random.key(1), z, False)
    expected = networks.Decoder(layers, whole, Style()).apply(variables, z, False)
    np.testing.assert_array_equal(decoder.apply(variables, z, False), expected[:, :7])


def test_an_old_configuration_is_migrated():
    fields = cifar10.get_config().to_dict()
    for name in ("height", "width"):
        del fields["dataset"][name]
    fields["dataset"]["image_size"] = 32
    for section, name in (("latent", "cell"), ("model", "head")):
        del fields[section][name]
    assert configs.from_dict(fields).to_dict() == cifar10.get_config().to_dict()
