"""Sliced Wasserstein distance between the patches of two sets of images (Karras et al. 2018).

"Progressive growing of GANs", section 5: patches of 7×7 pixels are taken from every level of the
images' Laplacian pyramids, down to 16 pixels. Each level's patches are normalised to mean 0 and
variance 1 per channel, in each set by itself. The distance of a level is the mean over 512 random
directions of the Wasserstein-1 distance between the projected patches, which for as many points on
both sides is the mean absolute difference of the sorted projections. The paper prints it times
1,000.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from svae_jax.evaluation.estimates import Estimate

PATCH = 7  # pixels a side
SMALLEST_LEVEL = 16  # pixels a side
PATCHES_PER_IMAGE = 128
NUM_DIRECTIONS = 512

_KERNEL = np.array([1, 4, 6, 4, 1], np.float32) / 16  # of Burt and Adelson (1983)
_IMAGES_AT_A_TIME = 500
_DIRECTIONS_AT_A_TIME = 16

Pixels = UInt8[np.ndarray, "n h w c"]


class SlicedWasserstein(NamedTuple):
    """Distances in standard deviations of a level's pixels.

    Attributes:
        sizes: height of each level's images in pixels, finest first.
        levels: the distance at each level.
        mean: the mean over levels.
    """

    sizes: tuple[int, ...]
    levels: tuple[Estimate, ...]
    mean: Estimate


def sliced_wasserstein(
    key: PRNGKeyArray,
    images: Pixels,
    reference: UInt8[np.ndarray, "m h w c"],
    *,
    max_patches: int = 2**17,
    num_groups: int = 10,
) -> SlicedWasserstein:
    """Returns the sliced Wasserstein distance of each pyramid level, and their mean.

    Every level compares as many patches of each set: 128 from each image of the smaller set, at
    most `max_patches`, and from all images of a set alike. Patches lie at random places, the same
    in two sets of one size, so that identical sets are at distance 0.

    The standard error comes from `num_groups` disjoint groups of images, each compared by itself:
    their distances' standard deviation over √`num_groups`. That costs as much again as the
    distances.

    Args:
        key: places and directions follow from it.
        images: one set.
        reference: the other.
        max_patches: bounds memory (1.2 kB a patch for 3 channels) and time.
        num_groups: 0 for no standard errors.

    Raises:
        ValueError: a set is empty, the images of the two differ in shape or are smaller than a
            patch, or `max_patches` is below 1.
    """
    _check(images, reference, max_patches)
    values = _distances(key, images, reference, max_patches)
    errors = np.full(len(values) + 1, math.nan)
    if num_groups > 1 and min(len(images), len(reference)) >= 2 * num_groups:
        pairs = zip(_groups(images, num_groups), _groups(reference, num_groups), strict=True)
        patches = max(max_patches // num_groups, 1)
        groups = [_with_mean(_distances(key, a, b, patches)) for a, b in pairs]
        errors = np.std(groups, axis=0, ddof=1) / math.sqrt(num_groups)
    found = (Estimate(v, float(e)) for v, e in zip(_with_mean(values), errors, strict=True))
    *levels, mean = found
    return SlicedWasserstein(_level_sizes(*images.shape[1:3]), tuple(levels), mean)


def _with_mean(values: list[float]) -> list[float]:
    return [*values, float(np.mean(values))]


def _check(images: np.ndarray, reference: np.ndarray, max_patches: int) -> None:
    if images.shape[1:] != reference.shape[1:] or not (len(images) and len(reference)):
        raise ValueError(
            "images and reference must be two sets of images of one shape, got "
            f"{images.shape} and {reference.shape}"
        )
    if min(images.shape[1:3]) < PATCH:
        raise ValueError(f"images must have {PATCH} or more pixels a side, got {images.shape}")
    if max_patches < 1:
        raise ValueError(f"max_patches must be at least 1, got {max_patches}")


def _groups(images: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Disjoint subsets of one size; interleaved, so that an order in the set does not matter."""
    size = len(images) // count
    return (images[i : size * count : count] for i in range(count))


def _level_sizes(height: int, width: int) -> tuple[int, ...]:
    """The height of every level: halved as long as both sides keep 16 pixels."""
    halvings = max(int(math.log2(min(height, width) / SMALLEST_LEVEL)), 0)
    return tuple(-(-height // 2**level) for level in range(halvings + 1))


def _distances(
    key: PRNGKeyArray, images: np.ndarray, reference: np.ndarray, max_patches: int
) -> list[float]:
    count = min(PATCHES_PER_IMAGE * min(len(images), len(reference)), max_patches)
    num_levels = len(_level_sizes(*images.shape[1:3]))
    distances = []
    for level in range(num_levels):
        places, directions = jax.random.split(jax.random.fold_in(key, level))
        sets = (_patches(places, x, level, num_levels, count) for x in (images, reference))
        distances.append(_sliced_distance(directions, *sets))
    return distances


def _patches(
    key: PRNGKeyArray, images: np.ndarray, level: int, num_levels: int, count: int
) -> Float[np.ndarray, "{count} d"]:
    """As many normalised patches of a set, in rounds over all of its images."""
    rounds = -(-count // len(images))
    patches: list[np.ndarray] = []
    for begin in range(0, len(images), _IMAGES_AT_A_TIME):
        chunk = images[begin : begin + _IMAGES_AT_A_TIME]
        chunk_key = jax.random.fold_in(key, begin)
        patches.append(np.asarray(_cut(chunk_key, chunk, level, num_levels, rounds)))
    rows = np.concatenate(patches, axis=1).reshape(-1, *patches[0].shape[2:])[:count]
    return np.asarray(_normalise(jnp.asarray(rows)))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _cut(
    key: PRNGKeyArray, images: UInt8[Array, "b h w c"], level: int, num_levels: int, rounds: int
) -> Float[Array, "{rounds} b p p c"]:
    """Patches at random places of one level of the images' pyramids."""
    band = laplacian_level(images.astype(jnp.float32), level, num_levels)
    height, width, channels = band.shape[1:]
    last = jnp.array([height - PATCH, width - PATCH])
    corners = jax.random.randint(key, (rounds, len(images), 2), 0, last + 1)

    def cut(image: Array, corner: Array) -> Array:
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), (PATCH, PATCH, channels))

    return jax.vmap(jax.vmap(cut), in_axes=(None, 0))(band, corners)


@jax.jit
def _normalise(patches: Float[Array, "m p p c"]) -> Float[Array, "m d"]:
    """Mean 0 and variance 1 of each channel over all patches."""
    centred = patches - jnp.mean(patches, axis=(0, 1, 2))
    deviation = jnp.sqrt(jnp.mean(centred**2, axis=(0, 1, 2)))
    return (centred / jnp.maximum(deviation, 1e-8)).reshape(len(patches), -1)


def _sliced_distance(
    key: PRNGKeyArray, a: Float[np.ndarray, "m d"], b: Float[np.ndarray, "m d"]
) -> float:
    """The mean Wasserstein-1 distance of the projections of two point sets on random directions.

    On the host, where NumPy's sort is sixteen times as fast as XLA's on a CPU.
    """
    directions = np.asarray(jax.random.normal(key, (NUM_DIRECTIONS, a.shape[1])))
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)

    def distances(some: Float[np.ndarray, "k d"]) -> Float[np.ndarray, " k"]:
        sorted_a, sorted_b = (np.sort(some @ x.T, axis=-1) for x in (a, b))
        return np.mean(np.abs(sorted_a - sorted_b), axis=-1)

    chunks = np.split(directions, NUM_DIRECTIONS // _DIRECTIONS_AT_A_TIME)
    return float(np.mean([distances(chunk) for chunk in chunks]))


def laplacian_level(
    images: Float[Array, "b h w c"], level: int, num_levels: int
) -> Float[Array, "b _h _w c"]:
    """One level of a Laplacian pyramid: the detail that the next coarser level lacks.

    The last level is the blurred and halved image itself. Borders are mirrored.
    """
    for _ in range(level):
        images = _blur(images)[:, ::2, ::2]
    if level == num_levels - 1:
        return images
    coarse = _blur(images)[:, ::2, ::2]
    spread = jnp.zeros_like(images).at[:, ::2, ::2].set(coarse)
    return images - 4 * _blur(spread)


def _blur(images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Convolves rows and columns with the binomial kernel (1, 4, 6, 4, 1)/16."""
    for axis in (1, 2):
        widths = [(2, 2) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(images, widths, mode="reflect")
        size = images.shape[axis]
        images = sum(
            (w * lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(_KERNEL)),
            start=jnp.zeros_like(images),
        )
    return images
