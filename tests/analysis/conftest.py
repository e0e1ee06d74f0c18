"""A run that is trained once for all tests here; a test that changes it takes a copy."""

import pytest

from svae_jax import sampler_config
from svae_jax.analysis import fitting
from svae_jax.training import loop
from tests import tiny


@pytest.fixture(scope="session")
def trained_run(tiny_images, tmp_path_factory):
    """A workdir of 4 updates, with a fitted Gaussian."""
    config = tiny.config(tiny_images, tmp_path_factory.getbasetemp() / "cache")
    config.update(num_steps=4)
    directory = tmp_path_factory.mktemp("runs") / "trained"
    loop.train(config, directory)
    fitting.fit(directory, "gaussian", sampler_config.base())
    return directory
