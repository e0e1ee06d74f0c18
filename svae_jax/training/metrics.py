"""Training metrics, accumulated inside jit."""

import flax
import jax.numpy as jnp
from clu import metrics


@flax.struct.dataclass
class RootMeanSquare(metrics.Average):
    """The root of the mean square: pools standard deviations."""

    @classmethod
    def from_model_output(cls, values, mask=None, **_):
        """Takes values of any shape, and a mask as `clu.metrics.Average` does."""
        return super().from_model_output(jnp.square(values), mask=mask)

    def compute(self):
        """The root mean square of all values so far, a scalar."""
        return jnp.sqrt(super().compute())


@flax.struct.dataclass
class Sum(metrics.Metric):
    """The sum of all values."""

    total: jnp.ndarray

    @classmethod
    def empty(cls):
        """Nothing yet."""
        return cls(total=jnp.zeros((), jnp.float32))

    @classmethod
    def from_model_output(cls, values, **_):
        """Takes values of any shape."""
        return cls(total=jnp.sum(values))

    def merge(self, other):
        """Adds."""
        return type(self)(total=self.total + other.total)

    def compute(self):
        """The sum, a scalar."""
        return self.total


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Averages over the steps between two logs, in nats an image.

    `TrainMetrics.single_from_model_output(loss=…, reconstruction=…, kl=…, sigma=…, skipped=…,
    mask=…)`, each an array; further names are ignored. A new metric is one more line here. Steps
    whose mask is 0 count only in `skipped`.

    sigma is pooled as a root mean square: under `objective.sigma=optimal` a step's σ² is its mean
    squared error, so the interval's σ² is the mean of its steps'.
    """

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    reconstruction: metrics.Average.from_output("reconstruction")  # type: ignore[valid-type]
    kl: metrics.Average.from_output("kl")  # type: ignore[valid-type]
    sigma: RootMeanSquare.from_output("sigma")  # type: ignore[valid-type]
    skipped: Sum.from_output("skipped")  # type: ignore[valid-type]
