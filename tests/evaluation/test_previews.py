"""`previews`: the pictures of a run, in the memory that its training takes."""

import jax
import numpy as np
import pytest

from svae_jax import config as configs
from svae_jax import model as models
from svae_jax.devices import batches, sharding
from svae_jax.evaluation import previews, steps


@pytest.mark.parametrize("limit", ["batch_size", "values"])
def test_pictures_do_not_depend_on_the_size_of_batches(tiny_config, monkeypatch, limit):
    recipe = configs.recipe(tiny_config, num_steps=10)
    variables = models.init(recipe.model, jax.random.key(0), recipe.image_shape)
    images = np.random.default_rng(0).integers(0, 256, (40, *recipe.image_shape), np.uint8)
    sizes = []

    def drawn(batch_size):
        given = (recipe._replace(batch_size=batch_size), variables, images, images)
        return previews.draw(*given, sample_every=10, mesh=sharding.make_mesh())

    whole = drawn(64)
    for name in ("encode", "decode"):
        function = getattr(steps, name)

        def watched(model, variables, rows, function=function):
            sizes.append(len(rows))
            return function(model, variables, rows)

        monkeypatch.setattr(steps, name, watched)
    if limit == "values":
        monkeypatch.setattr(batches, "_MOST_VALUES", 5 * images[0].size)
    small = drawn(5 if limit == "batch_size" else 64)
    assert set(sizes) == {5}
    for name in ("samples", "reconstructions"):
        np.testing.assert_allclose(small[name].astype(int), whole[name].astype(int), atol=1)
