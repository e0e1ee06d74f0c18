"""Stacks of layers: their text, their sizes, their numbers of parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import celeba, cifar10
from svae_jax import config as configs
from svae_jax import latents, likelihoods
from svae_jax import model as models
from svae_jax.model import layers as layer_lib
from svae_jax.model import networks, stacks
from svae_jax.model.layers import Layer, Style
from svae_jax.training import step

CELEBA = "3x3/64 3x3/32 5x5/32/s2 5x5/16/s2 5x5/image/s2"
CIFAR10 = "3x3/128 3x3/64 5x5/32/s2 5x5/image/s2"
GAUSSIAN = likelihoods.make("gaussian", image_shape=(32, 32, 3))
NAMES = ("vector", "naive", "mvn", "lowrank")


def test_parse():
    assert stacks.parse("5x5/32/s2 3x3/8/valid 1x1/4") == (
        Layer(5, 32, (2, 2)),
        Layer(3, 8, (1, 1), ("VALID", "VALID")),
        Layer(1, 4),
    )
    assert stacks.parse("5x5/image/s2", num_outputs=3) == (Layer(5, 3, (2, 2)),)


@pytest.mark.parametrize("word", ["5x3/8", "5/8", "5x5/8/s0", "0x0/8", "5x5", "5x5/8/same", "x"])
def test_parse_refuses_what_is_no_layer(word):
    with pytest.raises(ValueError, match=word):
        stacks.parse(f"3x3/4 {word}")


def test_parse_refuses_an_empty_stack_and_an_image_in_an_encoder():
    with pytest.raises(ValueError, match="at least one layer"):
        stacks.parse(" ")
    with pytest.raises(ValueError, match="only a decoder"):
        stacks.parse("5x5/image")


@pytest.mark.parametrize("num_outputs", [None, 3], ids=["encoder", "decoder"])
@pytest.mark.parametrize("stack", ["", "5x5"])
def test_what_is_no_stack_is_answered_by_one_that_is(stack, num_outputs):
    with pytest.raises(ValueError, match="as in '") as error:
        stacks.parse(stack, num_outputs)
    example = re.search("as in '(.*?)'", str(error.value))[1]
    assert len(stacks.parse(example, num_outputs)) > 1
    if num_outputs:
        _decoder(example, 3, 3, (12, 12))


def _decoder(stack, height, width, image_size=(32, 32)):
    return stacks.decoder_layers(
        stack, height=height, width=width, image_size=image_size, num_outputs=3
    )


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 3), (4, 4), (6, 6), (8, 8), (2, 6)])
def test_decoder_makes_images_of_the_right_size_with_the_same_weights(height, width):
    layers = _decoder(CIFAR10, height, width)
    decoder = networks.Decoder(layers, GAUSSIAN, Style())
    z = jnp.zeros((2, height, width, 5))
    variables = jax.eval_shape(lambda: decoder.init(jax.random.key(0), z, False))
    images = jax.eval_shape(lambda v: decoder.apply(v, z, False), variables)
    assert images.shape == (2, 32, 32, 3)
    assert networks.num_params(variables["params"]) == stacks.num_decoder_params(layers, 5, Style())
    three = stacks.num_decoder_params(_decoder(CIFAR10, 3, 3), 5, Style())
    assert networks.num_params(variables["params"]) == three


def test_decoder_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"latent.height must be 1 to 8, got 9: .* to 32 pixels"):
        _decoder(CIFAR10, 9, 3)
    with pytest.raises(ValueError, match=r"latent.width must be 15 to 128, got 14"):
        _decoder(CIFAR10, 15, 14, image_size=(512, 512))
    with pytest.raises(ValueError, match="features 'image'"):
        _decoder("3x3/8 3x3/8 5x5/3/s2", 3, 3)
    with pytest.raises(ValueError, match="begins with two layers 3x3"):
        _decoder("5x5/8 3x3/8 5x5/8/s2 5x5/image/s2", 3, 3)


def test_the_papers_decoders_have_the_papers_weights():
    def kernels(stack, maps, size):
        layers, total = _decoder(stack, 3, 3, (size, size)), 0
        for layer in layers:
            total += layer.kernel**2 * maps * layer.features
            maps = layer.features
        return total

    assert kernels(CELEBA, 64, 64) == 94_896
    assert kernels(CIFAR10, 128, 32) == 274_784


@pytest.mark.parametrize(
    ("config", "emitted", "front"),
    [(celeba, (162, 1152, 960, 768), 28), (cifar10, (300, 2304, 1920, 1536), 59)],
)
def test_paper_settings(config, emitted, front):
    """§4.4 of the paper: numbers emitted; and decoders of equal size, which the paper lacks."""
    counts = []
    for name, numbers in zip(NAMES, emitted, strict=True):
        recipe = configs.recipe(config.get_config(name), num_steps=1)
        state = jax.eval_shape(lambda recipe=recipe: step.init_state(recipe))
        assert recipe.model.posterior.num_params == numbers
        head = state.params["encoder"]["Dense_0"]["kernel"]
        assert head.shape[1] == numbers
        counts.append(networks.num_params(state.params["decoder"]))
    assert max(counts) <= 1.01 * min(counts)
    vector = configs.model(config.get_config("vector"))
    assert vector.decoder.layers[0] == Layer(3, front, (1, 1), ("VALID", "VALID"))


@pytest.mark.parametrize("norm", layer_lib.NORMS)
@pytest.mark.parametrize(("maps", "parity_maps"), [(150, 128), (40, 16), (300, 64)])
def test_vector_decoder_has_as_many_parameters(norm, maps, parity_maps):
    style = Style(norm=norm)
    layers = stacks.vector_decoder_layers(
        CIFAR10, maps=maps, parity_maps=parity_maps, image_size=(32, 32), num_outputs=3, style=style
    )
    decoder = networks.Decoder(layers, GAUSSIAN, style)
    variables = jax.eval_shape(
        lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 1, 1, maps)), False)
    )
    spatial = stacks.num_decoder_params(_decoder(CIFAR10, 3, 3), parity_maps, style)
    assert abs(networks.num_params(variables["params"]) - spatial) <= 0.01 * spatial


def test_vector_decoder_refuses_where_no_width_fits():
    with pytest.raises(ValueError, match="no width"):
        stacks.vector_decoder_layers(
            "3x3/512 3x3/4 5x5/image/s2",
            maps=4000,
            parity_maps=1,
            image_size=(16, 16),
            num_outputs=3,
            style=Style(),
        )


@pytest.mark.parametrize("norm", layer_lib.NORMS)
@pytest.mark.parametrize("dtype", layer_lib.DTYPES)
def test_parameters_statistics_and_outputs_are_float32(norm, dtype):
    style = Style(norm=norm, dtype=dtype)
    layers = stacks.parse("3x3/6/s2 3x3/8")
    small = likelihoods.make("gaussian", image_shape=(8, 8, 3))
    posterior = latents.make("vector", height=1, width=1, maps=5)
    encoder = networks.Encoder(layers, posterior, style)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = jax.jit(encoder.init, static_argnums=2)(jax.random.key(1), images, False)
    train = jax.jit(functools.partial(encoder.apply, train=True, mutable=["batch_stats"]))
    numbers, updated = train(variables, images)
    decoder = networks.Decoder(_decoder("3x3/6 3x3/4 3x3/image", 2, 2, (8, 8)), small, style)
    z = jax.random.normal(jax.random.key(2), (4, 2, 2, 5))
    decoder_variables = jax.jit(decoder.init, static_argnums=2)(jax.random.key(3), z, False)
    means = jax.jit(decoder.apply, static_argnums=2)(decoder_variables, z, False)
    leaves = jax.tree.leaves((variables, updated, decoder_variables, numbers, means))
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    assert jnp.max(jnp.abs(means)) <= 1
    # The computation itself is rounded to bfloat16, or it is not.
    exact = numbers if dtype == "float32" else None
    if exact is None:
        full = networks.Encoder(layers, posterior, Style(norm=norm))
        train = jax.jit(functools.partial(full.apply, train=True, mutable=["batch_stats"]))
        exact, _ = train(variables, images)
        assert not np.array_equal(exact, numbers)
    np.testing.assert_allclose(numbers, exact, atol=0.1)


def test_batch_norm_tracks_in_training_and_uses_what_it_tracked():
    encoder = networks.Encoder(
        stacks.parse("3x3/6"), latents.make("vector", height=1, width=1, maps=2), Style()
    )
    images = 3 + jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    variables = encoder.init(jax.random.key(1), images, False)
    train = jax.jit(functools.partial(encoder.apply, train=True, mutable=["batch_stats"]))
    for _ in range(100):
        _, updated = train(variables, images)
        variables = {**variables, **updated}
    training, _ = train(variables, images)
    np.testing.assert_allclose(encoder.apply(variables, images, False), training, atol=1e-3)
    # In evaluation an image does not depend on its neighbours.
    alone = encoder.apply(variables, images[:1], False)
    np.testing.assert_allclose(alone, encoder.apply(variables, images, False)[:1], atol=1e-5)


@pytest.mark.parametrize("features", [1, 7, 12, 32, 59, 30])
def test_group_norms_groups(features):
    groups = layer_lib.num_groups(features)
    assert features % groups == 0
    assert groups <= 8
    assert not any(features % n == 0 for n in range(groups + 1, 9))


@pytest.mark.parametrize("field", ["norm", "activation", "dtype", "convolutions"])
def test_style_refuses_unknown_names(field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*got 'no'"):
        Style(**{field: "no"})


def test_the_encoder_refuses_images_that_vanish():
    with pytest.raises(ValueError, match="leaves nothing"):
        stacks.encoder_size(stacks.parse("5x5/8/s2 5x5/8/s2/valid"), 8)


def small(name):
    """The configuration of a posterior, with narrow networks."""
    config = cifar10.get_config(name)
    config.model.update(encoder="3x3/4/s2 3x3/4/s2", decoder="3x3/16 3x3/8 5x5/4/s2 5x5/image/s2")
    config.latent.maps = 16
    if name == "vector":
        config.model.parity_maps = 16
    return config


def _init(model, seed):
    """Initial variables, in one program."""
    return jax.jit(models.init, static_argnums=(0, 2))(model, jax.random.key(seed), (32, 32, 3))


def test_no_posterior_starts_at_a_saddle():
    """The first gradient reaches every number of the encoder's last layer that makes the mean."""
    for name in latents.names():
        model = configs.model(small(name))
        images = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3), minval=-1, maxval=1)
        variables = _init(model, 1)

        def loss(params, model=model, variables=variables, images=images):
            outputs, _ = model.apply(
                {**variables, "params": params},
                jax.random.key(3),
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum((outputs.outputs - images) ** 2)

        gradient = jax.jit(jax.grad(loss))(variables["params"])["encoder"]["Dense_0"]["bias"]
        by_name = model.posterior.unpack(gradient)
        for part in ("mean", "mu", "nu"):
            if part in by_name:
                assert jnp.mean(jnp.abs(by_name[part]) > 1e-6) > 0.9, (name, part)


@pytest.mark.parametrize("nu_scale", [0.1, 0.001])
def test_a_step_of_adam_moves_nu_by_its_scale(nu_scale):
    """Adam's steps are equally long, whatever the gradients; the output's scale remains."""
    config = small("lowrank")
    config.latent.nu_scale = nu_scale
    model = configs.model(config)
    images = jax.random.uniform(jax.random.key(0), (8, 32, 32, 3), minval=-1, maxval=1)
    variables = _init(model, 1)

    @jax.jit
    def encode(head):
        params = variables["params"]
        encoder = params["encoder"] | {"Dense_0": head}
        changed = {**variables, "params": params | {"encoder": encoder}}
        return model.apply(changed, images, method="encode")

    def loss(head):
        return jnp.sum((model.posterior.mean(encode(head)) - 1) ** 2)

    head = variables["params"]["encoder"]["Dense_0"]
    optimizer = optax.adam(1e-3)
    updates, _ = optimizer.update(jax.grad(loss)(head), optimizer.init(head))
    before, after = encode(head), encode(optax.apply_updates(head, updates))
    moved = {name: float(jnp.mean(jnp.abs(after[name] - before[name]))) for name in ("mu", "nu")}
    assert moved["nu"] == pytest.approx(nu_scale * moved["mu"], rel=0.3)


def test_elu_and_its_derivative_are_jax_s(x64):
    x = jnp.concatenate([jnp.linspace(-40.0, 40.0, 201), jnp.array([0.0, 1e-12, -1e-12, 800.0])])
    actual, slope = jax.jvp(layer_lib.elu, (x,), (jnp.ones_like(x),))
    expected, expected_slope = jax.jvp(jax.nn.elu, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(actual, expected, rtol=1e-15)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-9, atol=1e-15)


def _tiny_model(convolutions):
    return models.make(
        latents.make("mvn", height=2, width=2, maps=2),
        GAUSSIAN,
        prior=latents.make_prior("standard", height=2, width=2, maps=2),
        encoder="5x5/4/s2 5x5/4/s2",
        decoder="3x3/4 3x3/4 5x5/4/s2 5x5/image/s2",
        style=Style(convolutions=convolutions),
    )


def test_a_decoder_of_laxs_convolutions_is_the_same_and_passes_forward_mode(x64):
    ours, lax = _tiny_model("auto"), _tiny_model("lax")
    variables = _init(ours, 0)
    z = jax.random.normal(jax.random.key(1), (1, 2, 2, 2), jnp.float64)

    def pixel(model, z):
        return model.apply(variables, z, method="decode")[0, 9, 11, 1]

    of_lax = jax.jit(functools.partial(pixel, lax))
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(pixel, ours)))(z)
    np.testing.assert_allclose(of_lax(z), value, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(of_lax))(z), gradient, rtol=1e-5, atol=1e-8)
    tangent = jnp.ones_like(z)
    step, slope = 3e-3, jax.jit(jax.grad(of_lax))  # the network computes in float32
    numerical = (slope(z + step * tangent) - slope(z - step * tangent)) / (2 * step)
    curvature = jax.jit(jax.hessian(of_lax))(z).reshape(z.size, z.size) @ tangent.ravel()
    np.testing.assert_allclose(curvature, numerical.ravel(), rtol=1e-2, atol=1e-5)
    assert models.with_lax_convolutions(ours) == lax
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(pixel, ours), (z,), (tangent,))
