"""Distributions whose aggregate is known, and their moments computed densely in NumPy."""

import numpy as np

from svae_jax.samplers import aggregate
from tests.latents.oracles import dense_covariance, numpy_mean


def dense_moments(post, params):
    """Mean ``[d]`` and covariance ``[d, d]`` of the equal mixture of these posteriors."""
    means = numpy_mean(params)
    count, h, w, n = means.shape
    within = np.zeros((h * w * n, h * w * n))
    for i in range(count):
        for k in range(n):
            rows = np.arange(h * w) * n + k  # the entries of map k among those of [h, w, n]
            one = {name: np.asarray(array[i], np.float64) for name, array in params.items()}
            within[np.ix_(rows, rows)] += dense_covariance(one, k) / count
    flat = means.reshape(count, -1).astype(np.float64)
    return flat.mean(axis=0), np.cov(flat.T, bias=True) + within


def encoded(means):
    """Posteriors of unit covariance over one map."""
    means = np.asarray(means, np.float32)
    covariance = len(means) * np.eye(means.shape[1], dtype=np.float32)
    return of([aggregate.Encoded(means, covariance[None])])


def of(batches):
    """Posteriors of these batches."""
    return aggregate.Posteriors(lambda: batches)


def clusters(count, distance=8.0, d=4, seed=0):
    """Points ``[count, d]`` of two clusters of unit variance, `distance` apart along (1, …, 1)."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-0.5, 0.5], (count, 1))
    return (signs * distance / np.sqrt(d) + rng.normal(size=(count, d))).astype(np.float32)


def share_between(points, distance=8.0):
    """The share of points in the middle third between the two centres of `clusters`."""
    along = points @ np.full(points.shape[1], points.shape[1] ** -0.5)
    return float(np.mean(np.abs(along) < distance / 6))
