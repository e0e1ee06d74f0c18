"""`locality`: the energy of the Jacobian, against finite differences and the decoder's geometry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from svae_jax import config as configs
from svae_jax import latents
from svae_jax import model as models
from svae_jax.analysis.exploring import locality, networks
from svae_jax.model.layers import Convolution, Layer, Style


def _reached(size, layers, axis):
    """The interval of pixels that each of `size` cells reaches along an axis, from the geometry.

    A transposed convolution is a convolution of the input with s − 1 zeros between its pixels, and
    padding as the documentation of `jax.lax.conv_transpose` gives it.
    """
    intervals = [(cell, cell) for cell in range(size)]
    for layer in layers:
        k, s, padding = layer.kernel, layer.strides[axis], layer.paddings[axis]
        before = k - 1 if padding == "VALID" or s > k - 1 else -(-(k + s - 2) // 2)
        size = size * s + (max(k - s, 0) if padding == "VALID" else 0)
        intervals = [
            (max(s * first + before - k + 1, 0), min(s * last + before, size - 1))
            for first, last in intervals
        ]
    return intervals


def _decoded(run, z):
    """Images as floats; those of `run.decode` are rounded to levels."""
    return networks.decode(
        run.model, run.variables, np.asarray(z, np.float32).reshape(-1, *z.shape[-3:])
    )


@pytest.fixture(scope="module")
def real(untrained):
    """A run with the decoder of the embedded data set, untrained."""
    config = configs.base()
    config.dataset.update(height=32, width=32, channels=3)
    config.latent.update(name="naive", maps=8)
    config.model.update(encoder="5x5/8/s4", decoder="3x3/16 3x3/8 5x5/8/s2 5x5/image/s2")
    return untrained(config)


@pytest.mark.parametrize("cell", [(0, 0), (1, 1), (2, 0)])
def test_an_edit_of_a_cell_changes_its_receptive_field_alone(real, cell):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    z, other = (real.encode(image).mean for image in (a, b))
    where = real.cell(*cell)[..., None]
    edited, kept = (_decoded(real, latent) for latent in (np.where(where, other, z), z))
    np.testing.assert_array_equal(real.edit(a, b, real.cell(*cell)), real.pixels.from_float(edited))
    changed = (edited - kept)[0] ** 2
    rows, cols = (
        slice(low, high + 1)
        for low, high in (
            _reached(3, real.model.decoder.layers, axis)[index] for axis, index in enumerate(cell)
        )
    )
    inside = changed[rows, cols].sum()
    assert inside >= 0.9 * changed.sum() > 0
    assert np.prod(changed[rows, cols].shape[:2]) < 32 * 32
    # The interval is the support itself, to the pixel.
    lit = np.argwhere(changed.sum(-1) > 1e-12)
    assert (*lit.min(0), *(lit.max(0) + 1)) == (rows.start, cols.start, rows.stop, cols.stop)


def test_energy_agrees_with_finite_differences(run):
    z = run.encode(run.images()[:1]).mean[0]
    found = locality.energy(run.model, run.variables, z).reshape(3, 3, 8, 8)
    expected, step = np.zeros((3, 3, 8, 8)), 0.01
    for i, j, k in np.ndindex(*z.shape):
        shift = np.zeros_like(z)
        shift[i, j, k] = step
        slope = (_decoded(run, z + shift).astype(float) - _decoded(run, z - shift)) / (2 * step)
        expected[i, j] += np.square(slope[0]).sum(-1)
    assert np.abs(found - expected).max() <= 1e-3 * expected.max()
    np.testing.assert_allclose(found.sum((2, 3)), expected.sum((2, 3)), rtol=1e-3)


def test_neither_chunks_nor_the_choice_of_a_cell_change_it(run):
    z = run.encode(run.images()[:1]).mean[0]
    whole = locality.energy(run.model, run.variables, z, chunk=36)
    for chunk in (5, 64):
        chunked = locality.energy(run.model, run.variables, z, chunk=chunk)
        np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-9)
    one = run.reach(run.images()[:1], 1, 2)
    np.testing.assert_allclose(one, whole[5], rtol=1e-5, atol=1e-9)


class Own(nn.Module):
    """A decoder of the user's own, of the package's layers, whose style is no field of it."""

    @nn.compact
    def __call__(self, z, train):
        layer = Layer(3, 4, strides=(4, 4))
        return Convolution(layer, Style(), transposed=True, use_bias=True)(jnp.sin(z))[..., :3]


def test_a_network_of_ones_own_of_the_packages_convolutions_has_an_energy():
    posterior = latents.make("naive", height=2, width=2, maps=2)
    model = models.SpatialVAE(posterior, encoder=Own(), decoder=Own())
    z = jax.random.normal(jax.random.key(0), (2, 2, 2))
    variables = model.init(jax.random.key(1), z[None], method="decode")
    jacobian = jax.jacrev(lambda z: model.apply(variables, z[None], method="decode")[0])(z)
    expected = np.square(jacobian).sum((2, 5)).transpose(2, 3, 0, 1).reshape(4, 8, 8)
    found = locality.energy(model, variables, np.asarray(z))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_memory_does_not_grow_with_the_maps(untrained):
    def megabytes(maps):
        config = configs.base()
        config.dataset.update(height=32, width=32, channels=3)
        config.latent.update(name="naive", maps=maps)
        config.model.update(encoder="5x5/8/s4", decoder="3x3/8 3x3/8 5x5/8/s2 5x5/image/s2")
        run = untrained(config)
        step = locality._squared_columns.__wrapped__
        of_run = functools.partial(step, run.model, count=16)
        z = np.zeros(run.latent_shape, np.float32)
        memory = jax.jit(of_run).lower(run.variables, z, 0).compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    jacobian = 9 * 256 * 32 * 32 * 3 * 4 / 2**20
    few, many = megabytes(4), megabytes(256)
    assert many < jacobian / 2
    assert many < 1.5 * few + 1


def test_the_numbers_of_known_energies():
    energy = np.zeros((2, 2, 4, 4))
    for i, j in np.ndindex(2, 2):
        energy[i, j, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = 1 + i
    found = locality.summarise(energy)
    assert found.own_share == 1
    np.testing.assert_allclose(found.spread, np.sqrt(0.5))  # of the four pixels of a square
    np.testing.assert_allclose(found.uniform_own_share, 1 / 4)
    np.testing.assert_allclose(found.uniform_spread, np.sqrt(2 * 15 / 12))
    # A cell at the wrong place owns nothing; a cell without energy counts for nothing.
    swapped = locality.summarise(energy[::-1])
    assert swapped.own_share == 0
    np.testing.assert_allclose(swapped.spread, found.spread)
    energy[0, 0] = 0
    energy[1, 1] *= 2
    found = locality.summarise(energy)
    assert found.own_share == 1
    np.testing.assert_allclose(found.spread, np.sqrt(0.5))


def test_every_pixel_has_one_owner():
    rows, cols = locality.owners((3, 2), (32, 8))
    np.testing.assert_array_equal(np.bincount(rows), [11, 10, 11])
    np.testing.assert_array_equal(cols, [0, 0, 0, 0, 1, 1, 1, 1])
