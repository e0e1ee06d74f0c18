"""Nearest neighbours: precision, recall, density and coverage, and the nearest training images.

Distances are Euclidean. Rows are compared in blocks, so memory grows with the number of rows, not
with its square.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from svae_jax.evaluation import estimates
from svae_jax.evaluation.estimates import Estimate

_ROWS_AT_A_TIME = 256
_BLOCK_BYTES = 2**28  # of one block of points, in float32

Features = Float[np.ndarray, "_n d"]


class Manifolds(NamedTuple):
    """How two sets of features cover each other; every set is the union of its rows' k-NN balls.

    Attributes:
        precision: share of samples inside the reference (Kynkäänniemi et al. 2019).
        recall: share of the reference inside the samples (the same).
        density: mean number of reference balls around a sample, over k (Naeem et al. 2020).
        coverage: share of the reference with a sample inside its own ball (the same).
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifolds(features: Features, reference: Features, *, k: int = 5) -> Manifolds:
    """Returns precision, recall, density and coverage of samples against a reference.

    A ball reaches to its row's k-th nearest neighbour in its own set. Each figure is a mean over
    images of one set; its standard error is over these, with the other set given. (A bootstrap
    would put copies of a row into its own ball.)

    Args:
        features: of the samples.
        reference: of real images.
        k: neighbours; 5 as in Naeem et al., 3 in Kynkäänniemi et al.

    Raises:
        ValueError: k is below 1, or a set has k rows or fewer.
    """
    if not 1 <= k < min(len(features), len(reference)):
        raise ValueError(
            f"k must be at least 1 and below the number of rows, got k={k} for "
            f"{len(features)} and {len(reference)} rows"
        )
    samples, real = jnp.asarray(features), jnp.asarray(reference)
    sample_radii, real_radii = (_squared_radii(x, k) for x in (samples, real))
    around_samples, _ = _balls_around(samples, real, real_radii)
    around_real, nearest = _balls_around(real, samples, sample_radii)
    means = (around_samples > 0, around_real > 0, around_samples / k, nearest < real_radii)
    return Manifolds(*(estimates.of_mean(np.asarray(x, np.float64)) for x in means))


class Nearest(NamedTuple):
    """The nearest point of each query.

    Attributes:
        indices: into the points.
        distances: Euclidean.
    """

    indices: Int[np.ndarray, " n"]
    distances: Float[np.ndarray, " n"]


def nearest(queries: Num[np.ndarray, "n *s"], points: Num[np.ndarray, "m *s"]) -> Nearest:
    """Returns the nearest point of each query, both images or both features.

    The search is in float32; the distance to what it finds is exact.

    Raises:
        ValueError: there is no point.
    """
    if not len(points):
        raise ValueError("points must not be empty")
    width = math.prod(points.shape[1:])
    rows, size = jnp.asarray(queries.reshape(-1, width)), max(_BLOCK_BYTES // (4 * width), 1)
    indices, best = np.zeros(len(rows), np.int64), np.full(len(rows), np.inf)
    for begin in range(0, len(points), size):
        found, squared = _closest(rows, points[begin : begin + size].reshape(-1, width))
        closer = np.asarray(squared) < best
        indices = np.where(closer, begin + np.asarray(found), indices)
        best = np.where(closer, squared, best)
    pairs = zip(queries, points[indices], strict=True)
    distances = [np.linalg.norm((a.astype(np.float64) - b).ravel()) for a, b in pairs]
    return Nearest(indices, np.array(distances))


class Memorisation(NamedTuple):
    """Whether samples lie closer to training images than held-out images do.

    Attributes:
        median_ratio: median distance of samples to their nearest training image, over that of
            held-out images. Below 1 hints at copies; but blurred samples lie close to everything
            in pixels.
        close_share: share of samples that are closer than all but 1% of the held-out images.
            Samples like held-out images give 0.01.
    """

    median_ratio: Estimate
    close_share: Estimate


def memorisation(
    key: PRNGKeyArray,
    samples: Float[np.ndarray, " n"],
    held_out: Float[np.ndarray, " m"],
    *,
    num_replicates: int = 200,
) -> Memorisation:
    """Compares distances to the nearest training image, of samples and of held-out images.

    The standard errors are bootstraps over both sets.
    """

    def ratio(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
        return float(np.median(a) / np.median(b))

    def share(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
        return float(np.mean(a < np.quantile(b, 0.01)))

    both = (samples, held_out)
    figures = (
        estimates.bootstrap(key, f, *both, num_replicates=num_replicates) for f in (ratio, share)
    )
    return Memorisation(*figures)


@partial(jax.jit, static_argnames="k")
def _squared_radii(points: Float[Array, "n d"], k: int) -> Float[Array, " n"]:
    """Squared distance of each point to its k-th nearest other point."""
    to_points = _squared_distances(points)

    def radius(i: Int[Array, ""]) -> Float[Array, ""]:
        to_others = jnp.where(jnp.arange(len(points)) == i, jnp.inf, to_points(points[i]))
        # Minima, not `lax.top_k`, which sorts the whole row where a CPU runs it in a loop.
        smallest = jnp.min(to_others)
        for _ in range(k - 1):
            next_larger = jnp.min(jnp.where(to_others > smallest, to_others, jnp.inf))
            is_kth = jnp.sum(to_others <= smallest) >= k  # as ties count
            smallest = jnp.where(is_kth, smallest, next_larger)
        return smallest

    return lax.map(radius, jnp.arange(len(points)), batch_size=_ROWS_AT_A_TIME)


@jax.jit
def _balls_around(
    rows: Float[Array, "n d"], points: Float[Array, "m d"], squared_radii: Float[Array, " m"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """How many points' balls hold each row, and its squared distance to the nearest point."""
    to_points = _squared_distances(points)

    def count(row: Float[Array, " d"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
        squared = to_points(row)
        return jnp.sum(squared < squared_radii), jnp.min(squared)

    return lax.map(count, rows, batch_size=_ROWS_AT_A_TIME)


@jax.jit
def _closest(
    rows: Num[Array, "n d"], points: Num[Array, "m d"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The nearest point of each row, and its squared distance."""
    to_points = _squared_distances(points)

    def find(row: Num[Array, " d"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
        squared = to_points(row)
        index = jnp.argmin(squared)
        return index, squared[index]

    return lax.map(find, rows, batch_size=_ROWS_AT_A_TIME)


def _squared_distances(points: Num[Array, "m d"]) -> Callable[[Array], Array]:
    """A function of a row that returns its squared distances to all points, `[m]`."""
    points = points.astype(jnp.float32)
    # Distances do not depend on the origin, but the rounding of large norms does.
    origin = jnp.mean(points, axis=0)
    points = points - origin
    norms = jnp.sum(points**2, axis=1)

    def squared_distances(row: Num[Array, " d"]) -> Float[Array, " m"]:
        row = row.astype(jnp.float32) - origin
        products = jnp.matmul(points, row, precision=lax.Precision.HIGHEST)
        return jnp.maximum(norms - 2 * products + jnp.sum(row**2), 0.0)

    return squared_distances
