"""An estimate and its standard error."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Num, PRNGKeyArray


class Estimate(NamedTuple):
    """A figure that images estimate.

    Attributes:
        value: the figure.
        standard_error: its standard deviation over new sets of images; NaN where it is unknown.
    """

    value: float
    standard_error: float

    def scaled(self, factor: float) -> "Estimate":
        """The estimate of a multiple of the figure."""
        return Estimate(self.value * factor, self.standard_error * abs(factor))


def of_mean(values: Num[np.ndarray, " n"]) -> Estimate:
    """Returns the mean of one value an image, in float64, and its standard error."""
    values = values.astype(np.float64)
    n = len(values)
    error = np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error))


def bootstrap(
    key: PRNGKeyArray,
    statistic: Callable[..., float],
    *sets: Num[np.ndarray, "_n *s"],
    num_replicates: int,
) -> Estimate:
    """Returns a statistic of sets of images with its bootstrap standard error.

    The rows of each set are drawn anew, with replacement, `num_replicates` times (Efron 1979); the
    error is the standard deviation of the replicates. A distance of resampled sets is biased
    upward, so the replicates serve for the error alone.

    Args:
        key: the draws follow from it.
        statistic: the sets -> a number.
        sets: arrays with one row an image.
        num_replicates: below 2 there is no standard error.
    """
    replicates = []
    for replicate_key in jax.random.split(key, num_replicates):
        keys = jax.random.split(replicate_key, len(sets))
        rows = (
            jax.random.randint(k, (len(x),), 0, len(x)) for k, x in zip(keys, sets, strict=True)
        )
        drawn = (x[np.asarray(r)] for x, r in zip(sets, rows, strict=True))
        replicates.append(statistic(*drawn))
    error = np.std(replicates, ddof=1) if num_replicates > 1 else math.nan
    return Estimate(float(statistic(*sets)), float(error))
