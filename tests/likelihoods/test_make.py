"""The table of likelihoods: names, scales, identity, errors, and a row of one's own."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from svae_jax import likelihoods
from svae_jax.pixels import PixelRange
from tests.likelihoods import oracles
from tests.likelihoods.oracles import every_likelihood

NAMES = (
    "gaussian",
    "gaussian_channels",
    "gaussian_blocks",
    "laplace",
    "discretized_logistic",
    "bernoulli",
)
SHAPE = (4, 4, 3)
KEY = jax.random.key(0)


def test_names():
    assert likelihoods.names() == NAMES


@every_likelihood
def test_a_likelihood_is_static_under_jit(name):
    one, same = oracles.make(name), oracles.make(name)
    assert one == same
    assert hash(one) == hash(same)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_shapes_of_scales(channels):
    for name, expected in (
        ("gaussian", ()),
        ("gaussian_channels", (channels,)),
        ("gaussian_blocks", (4 * channels,)),
        ("laplace", ()),
    ):
        likelihood = likelihoods.make(name, image_shape=(4, 2, channels))
        assert likelihood.scale_shape == expected
        assert likelihood.num_outputs == channels


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_given_or_learned_scale(x64, name):
    images, outputs = map(jnp.asarray, oracles.random_images(oracles.make(name), 3))
    given = oracles.make(name, sigma="0.7")
    assert not given.learns_scale
    assert given.given_scale.shape == given.scale_shape
    np.testing.assert_array_equal(given.training_scale(images, outputs, None), 0.7)
    learned = oracles.make(name, sigma="learned")
    assert learned.learns_scale
    assert learned.given_scale is None
    log_sigma = jnp.full(learned.scale_shape, -1.0)
    np.testing.assert_allclose(
        learned.training_scale(images, outputs, log_sigma), math.exp(-1), rtol=1e-12
    )


def test_a_given_scale_has_a_strong_type():
    """A weak one would take the dtype of bfloat16 images."""
    assert not oracles.make("gaussian", sigma="0.7").given_scale.weak_type


def test_a_likelihood_without_a_scale_ignores_it():
    likelihood = likelihoods.make("bernoulli", image_shape=SHAPE, pixels=oracles.BINARY)
    assert not likelihood.learns_scale
    images, logits = (jnp.asarray(x, jnp.float32) for x in oracles.random_images(likelihood, 3))
    scale = likelihood.training_scale(images, logits, None)
    for other in (scale, jnp.asarray(0.1), jnp.asarray(jnp.nan)):
        np.testing.assert_array_equal(
            likelihood.log_prob(other, images, logits), likelihood.log_prob(scale, images, logits)
        )
        np.testing.assert_array_equal(
            likelihood.sample(KEY, other, logits), likelihood.sample(KEY, scale, logits)
        )


def test_reported_sigma_is_the_root_mean_square():
    one = likelihoods.make("gaussian", image_shape=SHAPE)
    assert one.reported_sigma(jnp.asarray(0.3)) == np.float32(0.3)
    several = likelihoods.make("gaussian_channels", image_shape=SHAPE)
    sigma = several.reported_sigma(jnp.asarray([0.1, 0.2, 0.2]))
    np.testing.assert_allclose(sigma, math.sqrt(0.03), rtol=1e-6)


def test_reported_optimal_sigma_is_the_root_mean_squared_error(x64):
    for name in ("gaussian", "gaussian_channels", "gaussian_blocks"):
        likelihood = oracles.make(name, sigma="optimal")
        images, outputs = map(jnp.asarray, oracles.random_images(likelihood, 6))
        sigma = likelihood.reported_sigma(likelihood.training_scale(images, outputs, None))
        np.testing.assert_allclose(sigma, np.sqrt(np.mean((images - outputs) ** 2)), rtol=1e-12)


def test_the_smallest_optimal_sigma_is_the_same_part_of_a_bin():
    def min_sigma(*pixels):
        return likelihoods.make("gaussian", image_shape=SHAPE, pixels=PixelRange(*pixels)).min_sigma

    assert min_sigma() == math.exp(-6)
    assert min_sigma("uint16", 0.0, 65535.0) == pytest.approx(math.exp(-6) * 255 / 65535)
    assert min_sigma("float32", -3.0, 8.0) == pytest.approx(math.exp(-6))


@every_likelihood
def test_outputs_and_the_mean(name):
    likelihood = oracles.make(name)
    raw = 5 * jnp.asarray(oracles.random_images(likelihood, 2)[1], jnp.float32)
    outputs = likelihood.activate(raw)
    np.testing.assert_array_equal(outputs, raw if name == "bernoulli" else jnp.tanh(raw))
    mean = likelihood.mean(outputs)
    assert mean.shape == (2, *likelihood.image_shape)
    assert np.all(np.abs(mean) <= 1)


FLOATS = PixelRange("float32", 0.0, 1.0)
BASIS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def test_bernoulli_takes_bits_and_floats_from_0_to_1():
    for pixels in (oracles.BINARY, FLOATS, PixelRange("uint16", 0.0, 1.0)):
        likelihoods.make("bernoulli", image_shape=SHAPE, pixels=pixels)


def test_likelihoods_that_need_no_basis_ignore_it():
    for name in NAMES:
        likelihood = oracles.make(name, channel_basis=BASIS)
        assert likelihood.needs_channel_basis == hasattr(likelihood, "channel_basis")
        assert likelihood.needs_channel_basis == (name in ("gaussian_channels", "gaussian_blocks"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("student", {}, "^likelihood must be one of gaussian, .*, got 'student'"),
        ("gaussian", {"sigma": "0"}, "^sigma must be .*'0'"),
        ("gaussian", {"sigma": "-1"}, "^sigma must be"),
        ("gaussian", {"sigma": "nan"}, "^sigma must be"),
        ("gaussian", {"sigma": "1e-300"}, "^sigma must be .* number from 1e-08 to 1e.08, got"),
        ("gaussian", {"sigma": "1e300"}, "^sigma must be"),
        ("laplace", {"sigma": "inf"}, "^sigma must be"),
        ("gaussian_blocks", {"sigma": "best"}, "^sigma must be 'optimal', 'learned' or .*'best'"),
        ("discretized_logistic", {}, "^sigma must be 'learned' or a number.*'optimal'"),
        ("bernoulli", {"pixels": oracles.BINARY, "sigma": "0.1"}, "^sigma='0.1' does not apply"),
        ("bernoulli", {"pixels": oracles.BINARY, "sigma": "learned"}, "^sigma='learned' does not"),
        ("bernoulli", {}, "^likelihood='bernoulli' .*got 0,255; set dataset.value_range=0,1"),
        (
            "discretized_logistic",
            {"sigma": "learned", "pixels": FLOATS},
            "^likelihood='discretized_logistic' .*got float32; take likelihood='gaussian'",
        ),
        ("gaussian_blocks", {"image_shape": (5, 4, 3)}, "^image_shape must have .*got 5x4"),
        ("gaussian_blocks", {"image_shape": (4, 3, 3)}, "^image_shape must have .*got 4x3"),
        ("gaussian_channels", {"channel_basis": BASIS[:2]}, "^channel_basis must be 3 orthonormal"),
        ("gaussian_channels", {"channel_basis": ((1.0,), (1.0,), (1.0,))}, "^channel_basis must"),
        ("gaussian_channels", {"channel_basis": ((1.0,), *BASIS[1:])}, "^channel_basis must be"),
        ("gaussian_blocks", {"channel_basis": (BASIS[0], *BASIS[:2])}, "^channel_basis must be"),
        (
            "gaussian_blocks",
            {"channel_basis": ((2.0, 0.0, 0.0), *BASIS[1:])},
            "^channel_basis must be",
        ),
    ],
)
def test_bad_likelihoods_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        likelihoods.make(name, **({"image_shape": SHAPE} | fields))


# A likelihood of one's own.


@dataclass(frozen=True)
class StudentT(likelihoods.Likelihood):
    """Student's t with 5 degrees of freedom."""

    df: ClassVar[float] = 5.0

    def log_prob(self, scale, images, outputs):
        t = (images - outputs) / scale
        return jnp.sum(jax.scipy.stats.t.logpdf(t, self.df) - jnp.log(scale), axis=(-3, -2, -1))

    def sample(self, key, scale, outputs):
        return outputs + scale * jax.random.t(key, self.df, outputs.shape)


def test_a_likelihood_of_ones_own_needs_a_density_and_samples(x64, monkeypatch):
    monkeypatch.setitem(likelihoods._TABLE, "student", StudentT)
    assert likelihoods.names()[-1] == "student"
    likelihood = likelihoods.make("student", image_shape=SHAPE, sigma="learned")
    images, raw = map(jnp.asarray, oracles.random_images(likelihood, 3))
    outputs = likelihood.activate(raw)
    scale = likelihood.training_scale(images, outputs, jnp.asarray(-1.0))
    np.testing.assert_allclose(likelihood.reported_sigma(scale), math.exp(-1), rtol=1e-12)
    expected = scipy.stats.t.logpdf(images, 5, outputs, math.exp(-1)).sum((1, 2, 3))
    actual = likelihood.log_prob(scale, images, outputs)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    np.testing.assert_allclose(
        likelihood.mean_log_prob(scale, images, outputs), expected.mean(), rtol=1e-12
    )
    np.testing.assert_allclose(
        likelihood.log_mass(scale, images, outputs), expected + 48 * math.log(2 / 255), rtol=1e-12
    )
    assert likelihood.sample(KEY, scale, outputs).shape == images.shape
    with pytest.raises(ValueError, match="'learned' or a number"):
        likelihoods.make("student", image_shape=SHAPE)
