"""Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from svae_jax.evaluation import estimates
from svae_jax.evaluation.estimates import Estimate

_ROWS_AT_A_TIME = 2000

Features = Float[np.ndarray, "_n d"]


class FeatureGaussian(NamedTuple):
    """Mean and covariance of a set of features, in float64."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def fit(features: Features) -> FeatureGaussian:
    """Returns the mean and the unbiased covariance of two or more rows.

    Raises:
        ValueError: there are fewer rows.
    """
    if len(features) < 2:
        raise ValueError(f"features must have two or more rows, got {len(features)}")
    mean = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    covariance = np.zeros((len(mean), len(mean)))
    for begin in range(0, len(features), _ROWS_AT_A_TIME):
        centred = features[begin : begin + _ROWS_AT_A_TIME] - mean
        covariance += centred.T @ centred
    return FeatureGaussian(mean, covariance / (len(features) - 1))


def distance_of_gaussians(a: FeatureGaussian, b: FeatureGaussian) -> float:
    """Returns the squared 2-Wasserstein distance ‖m_a − m_b‖² + tr(A + B − 2 (A^½ B A^½)^½).

    With A = F Fᵀ and B = G Gᵀ the last trace is the sum of the singular values of Fᵀ G. No
    eigenvalue of a product is rooted, so nearly singular covariances lose no digits.
    """
    factors = _factor(a.covariance).T @ _factor(b.covariance)
    overlap = np.sum(np.linalg.svd(factors, compute_uv=False))
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * overlap)


def frechet_distance(
    key: PRNGKeyArray, features: Features, reference: Features, *, num_replicates: int = 10
) -> Estimate:
    """Returns the Fréchet distance of two sets of features.

    It is biased upward, the more so the fewer rows: compare sets of one size. The standard error is
    a bootstrap over the rows of both sets, of `num_replicates` replicates.
    """

    def distance(a: Features, b: Features) -> float:
        return distance_of_gaussians(fit(a), fit(b))

    return estimates.bootstrap(key, distance, features, reference, num_replicates=num_replicates)


def _factor(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """F with F Fᵀ the covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))
