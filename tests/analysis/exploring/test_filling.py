"""`Run.fill`: nothing leaks from under the mask, and the rest decides what comes there."""

import jax
import numpy as np
import pytest

from svae_jax import config as configs
from svae_jax.analysis.exploring import filling
from svae_jax.errors import UserError
from svae_jax.samplers.conditional import condition
from tests import tiny


@pytest.fixture(scope="module")
def learned(untrained, tiny_images, tmp_path_factory):
    """A run with a learned prior whose cells depend on each other."""
    config = tiny.config(tiny_images, tmp_path_factory.getbasetemp() / "cache")
    config.latent.prior = "tensor_normal"
    run = untrained(config, 3.0)
    rng = np.random.default_rng(0)
    prior = run.variables["params"]["prior"]
    prior |= {
        k: jax.numpy.asarray(rng.normal(scale=0.4, size=v.shape), "float32")
        for k, v in prior.items()
    }
    return run


@pytest.fixture
def mask():
    hidden = np.zeros((8, 8), bool)
    hidden[1:4, 2:7] = True
    return hidden


@pytest.mark.parametrize("kind", ["run", "learned"])
def test_what_lies_under_the_mask_changes_nothing(kind, run, mask, request):
    chosen = request.getfixturevalue(kind)
    image = run.images()[3]
    other = np.where(mask[..., None], 255 - image, image)
    found, again = chosen.fill(image, mask, 3), chosen.fill(other, mask, 3)
    for one, two in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, two)
    # What is visible does change it.
    visible = np.where(mask[..., None], image, 255 - image)
    assert not np.array_equal(chosen.fill(visible, mask, 3).mean, found.mean)


def test_with_nothing_masked_it_is_the_reconstruction(run):
    image = run.images()[0]
    found = run.fill(image, np.zeros((8, 8), bool), 2)
    np.testing.assert_array_equal(found.images, np.concatenate([run.reconstruct(image)] * 2))
    np.testing.assert_array_equal(found.mean, run.reconstruct(image))
    assert not found.cells.any()


def test_draws_differ_in_the_hole_and_depend_on_the_seed_and_their_number(learned, run, mask):
    image = run.images()[1]
    found = learned.fill(image, mask, 4, seed=7)
    assert found.images.shape == (4, 8, 8, 3)
    assert found.images.dtype == np.uint8
    assert len(np.unique(found.images, axis=0)) == 4
    np.testing.assert_array_equal(learned.fill(image, mask, 2, seed=7).images, found.images[:2])
    assert not np.array_equal(learned.fill(image, mask, 4, seed=8).images, found.images)
    expected = np.zeros((3, 3), bool)
    expected[:2] = True
    np.testing.assert_array_equal(found.cells, expected)


def test_the_estimate_is_a_fixed_point(run, mask):
    """The image with its hole filled by the mean is encoded to the known cells of that mean."""
    image = run.images()[2]
    found = run.fill(image, mask, 1)
    whole = np.where(mask[..., None], found.mean[0], image)
    gaussian = run.sampler("gaussian")
    conditional = condition(gaussian.sampler.factors(gaussian.params), found.cells)
    z = conditional.expected(run.encode(whole).mean[0])
    np.testing.assert_allclose(run.decode(z)[0].astype(int), found.mean[0], atol=1)


def test_cells_are_those_whose_patches_the_mask_touches():
    mask = np.zeros((32, 32), bool)
    mask[15, 16] = True
    cells = filling.cells_under(mask, (4, 4))
    assert np.argwhere(cells).tolist() == [[1, 2]]
    assert not filling.cells_under(np.zeros((32, 32), bool), (4, 4)).any()
    assert filling.cells_under(np.ones((7, 5), bool), (3, 2)).all()


def test_mistakes_are_told_in_one_line(run, learned, untrained, tiny_images, mask, tmp_path):
    image = run.images()[0]
    for wrong, message in (
        (mask.astype(int), r"mask must be booleans of shape \[8, 8\]"),
        (mask[:4], r"got bool of shape \[4, 8\]"),
    ):
        with pytest.raises(UserError, match=message):
            run.fill(image, wrong)
    with pytest.raises(UserError, match="num must be at least 1, got 0"):
        run.fill(image, mask, 0)
    with pytest.raises(UserError, match="image must be one image, got 2"):
        run.fill(run.images()[:2], mask)
    with pytest.raises(UserError, match="do not depend on each other; take sampler='gaussian'"):
        run.fill(image, mask, sampler="prior")
    with pytest.raises(UserError, match="the sampler gaussian is not fitted"):
        learned.fill(image, mask, sampler="gaussian")
    config = tiny.config(tiny_images, tmp_path)
    configs.latent_from_arg(config, "vector", C=4, N=128)
    config.model.decoder = "3x3/32 3x3/16 5x5/image"
    with pytest.raises(UserError, match="a latent of one cell"):
        untrained(config).fill(image, mask)
