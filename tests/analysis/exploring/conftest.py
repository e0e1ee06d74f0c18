"""A loaded run, and untrained ones of any posterior and stack."""

import jax
import pytest

import svae_jax
from svae_jax import config as configs
from svae_jax import model as models
from svae_jax.analysis.exploring import Run


@pytest.fixture(scope="session")
def run(trained_run):
    """The trained run, loaded."""
    return svae_jax.load(trained_run)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """(config, scale) -> a run of initial weights, times `scale`."""

    def make(config, scale=1.0):
        model = configs.model(config)
        init = jax.jit(models.init, static_argnums=(0, 2))
        variables = init(model, jax.random.key(0), model.likelihood.image_shape)
        variables["params"] = jax.tree.map(lambda leaf: scale * leaf, variables["params"])
        return Run(model, variables, config, 0, tmp_path_factory.getbasetemp())

    return make
