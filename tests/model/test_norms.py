"""Batch norm against Flax's, and its written-out gradient against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from svae_jax.model import layers, norms


def _arrays(dtype):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((5, 4, 3, 6)) + 2
    dy = rng.standard_normal(x.shape)
    scale, bias = rng.standard_normal((2, 6))
    return (jnp.asarray(a, dtype) for a in (x, dy, scale, bias))


def _autodiff(x, scale, bias):
    mean, variance = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_values_and_gradients(x64, monkeypatch, platform):
    """Both ways, on this machine, against autodiff of the definition."""
    monkeypatch.setattr(
        lax, "platform_dependent", lambda *args, cuda, rocm, default: (
            cuda if platform == "cuda" else default
        )(*args),
    )  # fmt: skip
    x, dy, scale, bias = _arrays(jnp.float64)

    def with_gradients(function):
        @jax.jit
        def run(x, scale, bias, dy):
            y, backward = jax.vjp(function, x, scale, bias)
            return y, backward(dy)

        return run(x, scale, bias, dy)

    y, gradients = with_gradients(lambda *args: norms.batch_norm(*args, 1e-5)[0])
    expected, expected_gradients = with_gradients(_autodiff)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_module_is_flaxs(dtype):
    """To the last bit, so that runs and checkpoints do not depend on which of them trained."""
    x, *_ = _arrays(dtype)
    ours = layers.BatchNorm(dtype)
    variables = ours.init(jax.random.key(0), x, train=True)
    variables["params"] = jax.tree.map(lambda a: a + 0.5, variables["params"])
    for train in (True, False):
        theirs = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)
        run = jax.jit(lambda v, x, m=ours, t=train: m.apply(v, x, t, mutable=["batch_stats"]))
        run_flax = jax.jit(lambda v, x, m=theirs: m.apply(v, x, mutable=["batch_stats"]))
        got, expected = run(variables, x), run_flax(variables, x)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        variables["batch_stats"] = got[1]["batch_stats"]
