"""Compile quickly: on arrays this small, XLA takes longer to optimise than to compute."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
