"""Moments over held-out images, on one device and on several."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax.devices import sharding
from svae_jax.evaluation.metrics import moments, over_images
from tests import command_line


def _eval_outputs(values):
    return {
        "elbo": values,
        "elbo_discretized": values - 1,
        "reconstruction": values + 2,
        "kl": 2 * jnp.ones_like(values),
        "squared_error": values * values,
    }


def test_eval_metrics_leave_the_padding_out():
    collection = moments(*_eval_outputs(jnp.zeros(1)))

    @jax.jit
    def update(total, values, mask):
        new = collection.single_from_model_output(**_eval_outputs(values), mask=mask)
        return total.merge(new)

    total = collection.empty()
    total = update(total, jnp.array([1.0, 2.0, 3.0]), jnp.array([True, True, True]))
    total = update(total, jnp.array([4.0, jnp.nan, -jnp.inf]), jnp.array([True, False, False]))
    expected = {"elbo": 2.5, "elbo_discretized": 1.5, "reconstruction": 4.5, "kl": 2.0}
    expected["squared_error"] = 7.5
    assert {name: float(value) for name, value in total.compute().items()} == expected


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from svae_jax.evaluation.metrics import moments
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
replicated = NamedSharding(mesh, P())
names = ("elbo", "kl")
collection = moments(*names)
@jax.jit
def update(values, mask):
    outputs = dict.fromkeys(names, values)
    return collection.single_from_model_output(**outputs, mask=mask)
merge = jax.jit(lambda a, b: a.merge(b), donate_argnums=0, out_shardings=replicated)
total = jax.device_put(collection.empty(), replicated)
values, mask = np.arange(8.0, dtype=np.float32), np.arange(8) < 5
for _ in range(2):
    total = merge(total, update(put(values), put(mask)))
assert total.elbo.mean.sharding.is_fully_replicated
print(jax.device_count(), float(total.compute()["elbo"]), int(total.elbo.count))
"""


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_metrics_of_arrays_spread_over_devices():
    result = _python(SHARDED, **command_line.host_devices(4))
    assert result.stdout.split() == ["4", "2.0", "10"], result.stderr


def test_means_and_standard_errors_lose_no_digits_in_float32():
    """Values of mean 1e5 and deviation 1, in float32: E[v²] − E[v]² would be all rounding."""
    values = np.float32(1e5 + np.random.default_rng(0).standard_normal(10_001))
    pixels = np.arange(10_001, dtype=np.uint16).view(np.uint8).reshape(-1, 1, 1, 2)  # the row

    def evaluate_batch(key, batch):
        low, high = batch[:, 0, 0, 0].astype(int), batch[:, 0, 0, 1].astype(int)
        value = jnp.asarray(values)[low + 256 * high]
        return {"scalar": value, "array": jnp.stack([value, -2 * value], axis=-1)}

    outputs = over_images(evaluate_batch, jax.random.key(0), pixels, 128, sharding.make_mesh())
    exact = values.astype(np.float64)
    scalar = outputs["scalar"].estimate()
    assert outputs["scalar"].num_images == 10_001
    assert abs(scalar.value - exact.mean()) < 0.01  # one float32 step
    assert scalar.standard_error == pytest.approx(exact.std(ddof=1) / np.sqrt(10_001), rel=1e-3)
    np.testing.assert_allclose(
        outputs["array"].variance, exact.var(ddof=1) * np.array([1, 4]), rtol=1e-3
    )


def test_a_single_image_has_no_standard_error():
    outputs = over_images(
        lambda key, batch: {"mean": jnp.mean(batch, axis=(1, 2, 3))},
        jax.random.key(0),
        np.full((1, 2, 2, 1), 7, np.uint8),
        4,
        sharding.make_mesh(),
    )
    assert outputs["mean"].mean == 7
    assert np.isnan(outputs["mean"].standard_error)
