"""Compile quickly: on arrays this small, XLA takes longer to optimise than to compute."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation(request):
    """All but the tests of masses, which are about rounding as it is in use."""
    optimised = request.module.__name__.endswith("test_masses")
    jax.config.update("jax_disable_most_optimizations", not optimised)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
