"""Evaluation metrics: means and variances over all images of a split."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray

from svae_jax.devices import batches, sharding
from svae_jax.evaluation.estimates import Estimate


@flax.struct.dataclass
class Moments(metrics.Metric):
    """Mean and variance over examples of an output `[b, *s]`, entry by entry.

    Batches are merged by their means and their squared deviations from these (Chan et al. 1979),
    which in float32 loses no digits where the mean is far above the standard deviation.
    """

    count: jnp.ndarray
    mean: jnp.ndarray
    squares: jnp.ndarray

    @classmethod
    def empty(cls):
        """Nothing yet."""
        return cls(count=jnp.zeros((), jnp.int32), mean=jnp.zeros(()), squares=jnp.zeros(()))

    @classmethod
    def from_model_output(cls, values, mask=None, **_):
        """Takes values `[b, *s]`; examples whose mask `[b]` is False count for nothing."""
        mask = jnp.ones(len(values), bool) if mask is None else mask.astype(bool)
        kept = mask.reshape(-1, *[1] * (values.ndim - 1))
        count = jnp.sum(mask)
        mean = jnp.sum(jnp.where(kept, values, 0), axis=0) / jnp.maximum(count, 1)
        squares = jnp.sum(jnp.where(kept, values - mean, 0) ** 2, axis=0)
        return cls(count=count, mean=mean, squares=squares)

    def merge(self, other):
        """Pools two sets of examples."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        shift = other.mean - self.mean
        squares = self.squares + other.squares + shift**2 * self.count * share
        return type(self)(count=count, mean=self.mean + shift * share, squares=squares)

    def compute(self):
        """The mean `[*s]`."""
        return self.mean


@functools.cache
def moments(*names: str) -> type[metrics.Collection]:
    """A collection of the `Moments` of each of these outputs.

    Its `single_from_model_output(elbo=…, …, mask=…)` takes arrays `[b, *s]`. Examples whose mask is
    0 or False (those that pad the last batch) count for nothing, even if they are NaN.

    Cached, so that the same names give the same type, which jit compiles for once.
    """
    return metrics.Collection.create(**{name: Moments.from_output(name) for name in names})


class OverImages(NamedTuple):
    """Mean and variance of an output over the images of a split, on the host.

    Attributes:
        num_images: n.
        mean: `[*s]`.
        variance: `[*s]`, over n − 1; NaN for a single image.
    """

    num_images: int
    mean: Float[np.ndarray, "*s"]
    variance: Float[np.ndarray, "*s"]

    @property
    def standard_error(self) -> Float[np.ndarray, "*s"]:
        """Of the mean, over images."""
        return np.asarray(np.sqrt(self.variance / self.num_images))

    def estimate(self) -> Estimate:
        """A scalar output's mean with its standard error."""
        return Estimate(float(self.mean), float(self.standard_error))


def over_images(
    evaluate_batch: Callable[[PRNGKeyArray, Array], Mapping[str, Array]],
    key: PRNGKeyArray,
    images: Num[np.ndarray, "n h w c"],
    batch_size: int,
    mesh: Mesh,
) -> dict[str, OverImages]:
    """Evaluates all images in batches, each image once, and returns each output's moments.

    Args:
        evaluate_batch: the batch's key and its pixels `[b, h, w, c]` -> arrays `[b, *s]` by name.
        key: batch i gets its fold with i.
        images: at least one.
        batch_size: images over all devices.
        mesh: the devices.
    """
    totals: metrics.Collection | None = None
    for batch in batches.split(images, batch_size, mesh):
        batch_key = jax.random.fold_in(key, batch.begin // batch_size)
        values = dict(evaluate_batch(batch_key, batch.rows))
        totals = _add(mesh, totals or moments(*sorted(values)).empty(), batch.inside, values)
    assert totals is not None  # a split holds at least one image
    return {name: _on_host(getattr(totals, name)) for name in totals.compute()}


@functools.partial(jax.jit, static_argnums=0)
def _add(
    mesh: Mesh,
    totals: metrics.Collection,
    mask: Bool[Array | np.ndarray, " b"],
    values: dict[str, Float[Array, "b ..."]],
) -> metrics.Collection:
    total = totals.merge(type(totals).single_from_model_output(mask=mask, **values))
    return jax.lax.with_sharding_constraint(total, sharding.replicated(mesh))


def _on_host(total: Moments) -> OverImages:
    count = int(total.count)
    squares = np.asarray(total.squares, np.float64)
    variance = np.asarray(squares / (count - 1)) if count > 1 else np.full_like(squares, np.nan)
    return OverImages(count, np.asarray(total.mean, np.float64), variance)
