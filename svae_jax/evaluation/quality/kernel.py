"""Kernel distance between two sets of features (KID, Bińkowski et al. 2018)."""

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from svae_jax.evaluation import estimates
from svae_jax.evaluation.estimates import Estimate

_MIN_BLOCKS = 10

Features = Float[np.ndarray, "_n d"]


def kernel_distance(
    key: PRNGKeyArray, features: Features, reference: Features, *, max_block: int = 1000
) -> Estimate:
    """Returns the squared maximum mean discrepancy under the kernel (x·y/d + 1)³, unbiased.

    Both sets are shuffled and cut into as many disjoint blocks: of `max_block` rows of the smaller
    set, or of a tenth of it where that is less. The value is the mean of the blocks' unbiased
    estimates (Zaremba et al. 2013), which are independent; so their spread gives the standard
    error.

    Raises:
        ValueError: a set has fewer than two rows.
    """
    sets, smaller = (features, reference), min(len(features), len(reference))
    if smaller < 2:
        raise ValueError(f"features and reference must have two or more rows, got {smaller}")
    size = max(min(max_block, smaller // _MIN_BLOCKS), 2)
    blocks = [
        np.array_split(np.asarray(jax.random.permutation(k, len(x))), smaller // size)
        for k, x in zip(jax.random.split(key), sets, strict=True)
    ]
    pairs = zip(*blocks, strict=True)
    return estimates.of_mean(np.array([squared_mmd(features[a], reference[b]) for a, b in pairs]))


def squared_mmd(features: Features, reference: Features) -> float:
    """Returns the unbiased estimate from all pairs of different rows (Gretton et al. 2012)."""
    x, y = features.astype(np.float64), reference.astype(np.float64)
    return float(_mean_within(x) + _mean_within(y) - 2 * np.mean(_kernel(x, y)))


def _kernel(x: Features, y: Features) -> Float[np.ndarray, "_n _m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_within(x: Features) -> float:
    """The kernel's mean over the pairs of different rows."""
    kernel, n = _kernel(x, x), len(x)
    return (np.sum(kernel) - np.trace(kernel)) / (n * (n - 1))
