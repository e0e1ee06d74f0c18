"""Every place that takes a seed refuses what is none, in the same words, before it begins."""

import numpy as np
import pytest

import svae_jax
from svae_jax import config as configs
from svae_jax import recipe, sampler_config, samplers
from svae_jax.analysis import drawing, evaluating
from svae_jax.analysis.report import page


def _configured(config):
    config.seed = 2**32
    return config


HOLE = np.zeros((8, 8), bool)
PLACES = {
    "config": lambda run, out: configs.check(_configured(configs.base())),
    "recipe": lambda run, out: recipe.stream(-1, "init"),
    "sampler_config": lambda run, out: sampler_config.check(
        _configured(sampler_config.base()), "flow"
    ),
    "flow": lambda run, out: samplers.TABLE["flow"]((3, 3, 4), seed=-1),
    "mixture": lambda run, out: samplers.TABLE["mixture"]((3, 3, 4), seed=-1),
    "sample": lambda run, out: svae_jax.load(run).sample(1, seed=-1),
    "fill": lambda run, out: svae_jax.load(run).fill(
        np.zeros((8, 8, 3), np.uint8), HOLE, seed=2**32
    ),
    "drawing.sample": lambda run, out: drawing.sample(run, "prior", out, "npz", num=1, seed=-1),
    "drawing.reconstruct": lambda run, out: drawing.reconstruct(run, ["a.png"], out, "npz", -1),
    "evaluate": lambda run, out: evaluating.evaluate(run, evaluating.Settings(seed=2**40)),
    "explore": lambda run, out: page.write([run], out, seed=-1),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_refuses_what_is_no_seed(place, trained_run, tmp_path):
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\^32 - 1, got "):
        PLACES[place](trained_run, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
