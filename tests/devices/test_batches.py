"""`batches`: every row once, whatever the devices; fits and samples that do not depend on them."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from svae_jax.devices import batches, sharding
from tests import command_line


def test_every_row_comes_once_and_in_order():
    rows = np.arange(14).reshape(7, 2)
    seen = list(batches.split(rows, 3))
    assert [(batch.begin, batch.size) for batch in seen] == [(0, 3), (3, 3), (6, 1)]
    assert {batch.rows.shape for batch in seen} == {(3, 2)}
    np.testing.assert_array_equal(seen[2].rows, rows[[6, 6, 6]])
    np.testing.assert_array_equal(seen[2].inside, [True, False, False])
    twice = batches.gather(lambda batch: {"a": 2 * batch.rows}, rows, 3, sharding.make_mesh())
    np.testing.assert_array_equal(twice["a"], 2 * rows)


def test_chosen_rows_come_in_the_given_order():
    found = batches.split(np.arange(10), 2, chosen=np.array([7, 1, 4]))
    assert [batch.rows[: batch.size].tolist() for batch in found] == [[7, 1], [4]]


def test_large_rows_make_small_batches():
    assert batches.size_for((32, 32, 3), 250) == 250
    assert batches.size_for((256, 256, 3), 250) == 2**24 // (256 * 256 * 3)
    assert batches.size_for((2**13, 2**13, 3), 250) == 1


# Fits every kind of sampler to the posteriors of 21 images, draws latents and decodes them.
FITS = """
import sys
import jax, numpy as np
from svae_jax import samplers
from svae_jax import config as configs
from svae_jax.devices import batches
from svae_jax.evaluation import steps
from svae_jax.model import init
from svae_jax.samplers import aggregate

config = configs.base()
config.dataset.update(height=8, width=8, channels=3)
config.latent.update(name="mvn_full", height=3, width=3, maps=2)
config.model.update(encoder="3x3/4/s2 3x3/4/s2", decoder="3x3/4 3x3/4 3x3/image", norm="none")
model = configs.recipe(config, 1).model
variables = jax.jit(init, static_argnums=(0, 2))(model, jax.random.key(0), (8, 8, 3))
# Emitted parameters that differ from image to image.
variables = jax.tree.map(
    lambda leaf: leaf + 0.3 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), variables
)
images = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), np.uint8)
shape, key = (3, 3, 2), jax.random.key(1)
kinds = {
    "gaussian": samplers.Gaussian(shape),
    "kronecker": samplers.Kronecker(shape),
    "mixture": samplers.Mixture(shape, components=2, noise=True),
}
small = dict(width=8, depth=1, num_params=4000, num_steps=3, batch_size=10, ode_steps=2)
kinds |= {
    "flow": samplers.Flow(shape, **small), "latent_flow": samplers.LatentFlow(shape, **small)
}
assert set(kinds) == set(samplers.names()) - {"prior"}
found = {}
posteriors = aggregate.posteriors(model, variables, images, key)
for name, sampler in kinds.items():
    params = samplers.fit(sampler, posteriors)
    found[name] = samplers.draw(sampler, params, key, 5)
found["images"] = batches.gather(
    lambda batch: steps.decode(model, variables, batch.rows), np.asarray(found["gaussian"]), 3
)
found["mean"] = posteriors.moments.mean
found["covariance"] = posteriors.moments.covariance
found["rows"] = posteriors.axis_covariances.rows
found["devices"] = jax.device_count()
np.savez(sys.argv[1], **found)
"""


def test_fits_and_samples_do_not_depend_on_the_number_of_devices(tmp_path):
    found = {}
    for count in (1, 8):  # more devices than rows of some batches
        done = subprocess.run(
            [sys.executable, "-c", FITS, str(tmp_path / f"{count}.npz")],
            env=os.environ | command_line.host_devices(count),
            cwd=command_line.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / f"{count}.npz") as archive:
            found[count] = dict(archive)
        assert found[count].pop("devices") == count
    for name, one in found[1].items():
        assert np.std(one) > 1e-3, name
        np.testing.assert_allclose(found[8][name], one, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.uniform])
def test_random_numbers_begin_alike_whatever_the_length(draw):
    """So copies that fill up a batch do not change the numbers of the others."""
    key = jax.random.key(0)
    np.testing.assert_array_equal(draw(key, (8, 3))[:5], draw(key, (5, 3)))
