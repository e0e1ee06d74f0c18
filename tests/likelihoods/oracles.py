"""Likelihoods of small images, and what SciPy says of them."""

import numpy as np
import pytest
import scipy.stats

from svae_jax import likelihoods
from svae_jax.pixels import PixelRange

SHAPE = (4, 2, 3)
BITS12 = PixelRange("uint16", 0.0, 4095.0)
BITS16 = PixelRange("uint16", 0.0, 65535.0)
BINARY = PixelRange("uint8", 0.0, 1.0)
FOUR_LEVELS = PixelRange("uint8", 0.0, 3.0)

every_likelihood = pytest.mark.parametrize("name", likelihoods.names())
DENSITIES = ("gaussian", "gaussian_channels", "gaussian_blocks", "laplace")
DISTRIBUTIONS = {
    "gaussian": scipy.stats.norm,
    "laplace": scipy.stats.laplace,
    "discretized_logistic": scipy.stats.logistic,
}


def random_basis(size, seed=0):
    """An orthonormal basis that is neither symmetric nor diagonal."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return tuple(map(tuple, basis.tolist()))


def make(name, image_shape=SHAPE, pixels=None, **kwargs):
    """A likelihood with a random basis and a scale that the caller is to give."""
    if pixels is None:
        pixels = BINARY if name == "bernoulli" else PixelRange()
    kwargs.setdefault("sigma", "optimal" if name == "bernoulli" else "learned")
    kwargs.setdefault("channel_basis", random_basis(image_shape[2]))
    return likelihoods.make(name, image_shape=image_shape, pixels=pixels, **kwargs)


def random_scale(likelihood, low=0.1, high=0.6, seed=1):
    """A scale, different in each direction."""
    return np.random.default_rng(seed).uniform(low, high, likelihood.scale_shape)


def random_images(likelihood, *batch, seed=2):
    """Images of the levels, and outputs, each [*batch, h, w, c]."""
    rng = np.random.default_rng(seed)
    shape = (*batch, *likelihood.image_shape)
    pixels = likelihood.pixels
    images = rng.integers(int(pixels.low), int(pixels.high), shape, endpoint=True)
    images = (images - pixels.low) * 2 * pixels.half_bin - 1
    return images, rng.uniform(-0.9, 0.9, (*shape[:-1], likelihood.num_outputs))


def covariance(likelihood, scale):
    """Σ of the values of a block in the order row, column, channel; of one pixel for channels."""
    basis = np.eye(likelihood.image_shape[2])
    if likelihood.channel_basis is not None:
        basis = np.array(likelihood.channel_basis)
    patterns = [[1.0]]
    if len(scale) == 4 * len(basis):
        # Of the pixels (0, 0), (0, 1), (1, 0), (1, 1).
        patterns = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
        patterns = np.array(patterns) / 2
    directions = [np.kron(pattern, row) for pattern in patterns for row in basis]
    return sum(s**2 * np.outer(v, v) for s, v in zip(scale, directions, strict=True))


def blocks(likelihood, images):
    """[b, h, w, c] -> the values of each block [b, n, k]; of each pixel for channels."""
    side = 2 if likelihood.scale_shape[0] == 4 * likelihood.image_shape[2] else 1
    height, width, _ = likelihood.image_shape
    values = [
        images[:, i : i + side, j : j + side].reshape(len(images), -1)
        for i in range(0, height, side)
        for j in range(0, width, side)
    ]
    return np.stack(values, axis=1)


def log_density(name, likelihood, scale, images, outputs):
    """SciPy's log p(x|z) [b]."""
    if name in DISTRIBUTIONS:
        return DISTRIBUTIONS[name].logpdf(images, outputs, scale).sum((1, 2, 3))
    error = blocks(likelihood, images - outputs)
    normal = scipy.stats.multivariate_normal(cov=covariance(likelihood, scale))
    return normal.logpdf(error).reshape(error.shape[:-1]).sum(1)


def log_bin_mass(distribution, images, mean, scale, half_bin):
    """log of a difference of SciPy's CDFs, of each value; the end bins take the tails."""
    lower = np.where(images < -1 + half_bin, -np.inf, images - half_bin)
    upper = np.where(images > 1 - half_bin, np.inf, images + half_bin)
    given = (mean, scale)
    below = distribution.cdf(upper, *given) - distribution.cdf(lower, *given)
    above = distribution.sf(lower, *given) - distribution.sf(upper, *given)
    with np.errstate(divide="ignore"):
        return np.log(np.where(images > mean, above, below))
