"""Averages over the steps between two logs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax.training.metrics import TrainMetrics


def _outputs(step):
    return {
        "loss": jnp.float32(step),
        "reconstruction": jnp.float32(10 * step),
        "kl": jnp.float32(0.5),
        "sigma": jnp.float32(step),
        "skipped": jnp.float32(step),
        "not_a_metric": jnp.ones(3),
    }


def test_train_metrics_average_over_steps_in_donated_accumulators():
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def accumulate(total, outputs):
        traces.append(total)
        return total.merge(TrainMetrics.single_from_model_output(**outputs))

    total = TrainMetrics.empty()
    for step in (1, 2, 6):
        previous, total = total, accumulate(total, _outputs(step))
        assert previous.loss.total.is_deleted()
    assert len(traces) == 1  # empty() has the types of what follows
    computed = {name: float(value) for name, value in total.compute().items()}
    rms = np.sqrt((1 + 4 + 36) / 3)
    expected = {"loss": 3, "reconstruction": 30, "kl": 0.5, "sigma": rms, "skipped": 9}
    assert computed == pytest.approx(expected)


def test_train_metrics_are_a_scan_carry():
    def body(total, step):
        update = TrainMetrics.single_from_model_output(**_outputs(step))
        return total.merge(update), None

    total, _ = jax.lax.scan(body, TrainMetrics.empty(), jnp.arange(4.0))
    assert float(total.compute()["loss"]) == 1.5
