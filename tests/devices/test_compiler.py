"""`compiler` against plain `jax.jit`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax.devices import compiler


@functools.partial(compiler.jit, static_argnums=0)
def _power(exponent, x):
    """A power."""
    return x**exponent


@pytest.fixture
def unknown_option(monkeypatch):
    monkeypatch.setattr(compiler, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    compiler.options.cache_clear()
    yield
    compiler.options.cache_clear()


def test_this_xla_knows_the_options():
    assert compiler.options("cpu")
    assert not compiler.options("gpu")


def test_options_that_xla_does_not_know_are_left_out(unknown_option):
    assert compiler.options("cpu") == {}
    assert compiler.jit(lambda x: x + 1)(1.0) == 2


def test_it_can_be_traced_within_other_functions():
    x = jnp.arange(4.0)
    assert _power.__doc__ == "A power."
    np.testing.assert_array_equal(_power(3, x), x**3)
    np.testing.assert_array_equal(jax.jit(lambda x: _power(3, x))(x), x**3)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda x: _power(3, x)))(x), 3 * x**2)
    assert jax.eval_shape(lambda x: _power(3, x), x).shape == (4,)


def test_it_compiles_once_for_each_shape():
    traced = []

    @compiler.jit
    def double(x):
        traced.append(x.shape)
        return 2 * x

    for size in (2, 2, 3, 2):
        double(jnp.zeros(size))
    assert traced == [(2,), (3,)]
