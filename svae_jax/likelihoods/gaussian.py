"""Gaussian likelihoods: one σ, or one for each direction of the channels or of a 2×2 block."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Num, PRNGKeyArray

from svae_jax.likelihoods.base import Images, Likelihood, Outputs, Scale
from svae_jax.likelihoods.bins import log_bin_mass
from svae_jax.pixels import PixelRange

ChannelBasis = tuple[tuple[float, ...], ...]
"""Rows: orthonormal directions of the channels."""

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """N(x; f(z), σ²I), the paper's likelihood."""

    has_optimal: ClassVar[bool] = True

    def error(self, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """The squared error of each image."""
        return jnp.sum(jnp.square(images - outputs), axis=(-3, -2, -1))

    def optimal_scale(self, mean_error: Float[Array, ""]) -> Scale:
        """The root mean squared error, at least `min_sigma`."""
        # The maximum is inside the root, whose slope at 0 is infinite.
        return jnp.sqrt(jnp.maximum(mean_error / math.prod(self.image_shape), self.min_sigma**2))

    def log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log N(x; f(z), σ²I) of the density over [-1, 1]."""
        return self._density(scale, self.error(images, outputs))

    def mean_log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, ""]:
        """The mean of `log_prob`, from the mean error, which optimal σ needs too."""
        return self._density(scale, jnp.mean(self.error(images, outputs)))

    def _density(self, scale: Scale, error: Float[Array, "*b"]) -> Float[Array, "*b"]:
        constant = math.prod(self.image_shape) * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))
        return -0.5 * error / scale**2 - constant

    def log_mass(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log P(x|z): the Gaussian's mass in the bin of each integer.

        The first and last bin take the tails, so the masses of a value sum to 1.
        """
        half_bin = self.pixels.half_bin
        d = (images - outputs) / scale
        return jnp.sum(_log_bin_mass(images, d, half_bin / scale, self.pixels), axis=(-3, -2, -1))

    def sample(self, key: PRNGKeyArray, scale: Scale, outputs: Outputs) -> Images:
        """f(z) + σε."""
        return outputs + scale * jax.random.normal(key, outputs.shape, outputs.dtype)


@dataclass(frozen=True)
class GaussianChannels(Likelihood):
    """N(x; f(z), I ⊗ Q diag(σ²) Qᵀ): one σ for each orthonormal direction of the channels.

    Attributes:
        channel_basis: the directions as rows, the columns of Q; None for the channels themselves.
    """

    channel_basis: ChannelBasis | None = None

    has_optimal: ClassVar[bool] = True
    needs_channel_basis: ClassVar[bool] = True

    block: ClassVar[int] = 1
    """The side of a block in pixels: blocks are independent, and have the same covariance."""

    def __post_init__(self):
        """Checks sigma and the basis."""
        super().__post_init__()
        c, rows = self.image_shape[2], self.channel_basis
        if rows is not None and not _is_orthonormal(rows, c):
            raise ValueError(f"channel_basis must be {c} orthonormal rows of {c}, got {rows}")

    @property
    def directions(self) -> Float[np.ndarray, "d d"]:
        """Qᵀ: rows are orthonormal directions of a block's values, ordered as in `_blocks`."""
        c, rows = self.image_shape[2], self.channel_basis
        return np.eye(c) if rows is None else np.asarray(rows, np.float64)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """One σ for each direction."""
        return (self.block**2 * self.image_shape[2],)

    @property
    def _num_blocks(self) -> int:
        height, width, _ = self.image_shape
        return height * width // self.block**2

    def error(self, images: Images, outputs: Outputs) -> Float[Array, "*b d"]:
        """The squared error along each direction, summed over blocks."""
        return jnp.sum(jnp.square(self._project(images - outputs)), axis=-2)

    def optimal_scale(self, mean_error: Float[Array, "d"]) -> Scale:
        """The root mean squared error along each direction, at least `min_sigma`."""
        return jnp.sqrt(jnp.maximum(mean_error / self._num_blocks, self.min_sigma**2))

    def log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """The log-density over [-1, 1]."""
        return self._density(scale, self.error(images, outputs))

    def mean_log_prob(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, ""]:
        """The mean of `log_prob`, from the mean errors, which optimal σ need too."""
        error = self.error(images, outputs)
        return self._density(scale, jnp.mean(error, axis=tuple(range(error.ndim - 1))))

    def _density(self, scale: Scale, error: Float[Array, "*b d"]) -> Float[Array, "*b"]:
        constant = self._num_blocks * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))
        return jnp.sum(-0.5 * error / scale**2 - constant, axis=-1)

    def log_mass(self, scale: Scale, images: Images, outputs: Outputs) -> Float[Array, "*b"]:
        """log P(x|z) in the conditional form, a discrete model whose masses sum to 1.

        A box under a correlated Gaussian has no closed form. So, value by value in a block: the
        mass of the value's bin under the Gaussian given the exact earlier values of the block.
        With a block's covariance Σ = Q diag(σ²) Qᵀ = L Lᵀ and e = L⁻¹(x − μ), value i given the
        earlier ones has mean x_i − L_ii e_i and standard deviation L_ii. The first and last bin
        take the tails.
        """
        # From (diag(σ) Qᵀ) = U R: Σ = Rᵀ R, L = Rᵀ and e = Uᵀ diag(1/σ) Qᵀ (x − μ). Σ is never
        # formed: its condition number is the square of the scales' ratio.
        u, r = jnp.linalg.qr(scale[:, None] * jnp.asarray(self.directions, scale.dtype))
        diagonal = jnp.diagonal(r)
        whitened = self._project(images - outputs) / scale
        e = jnp.dot(whitened, u * jnp.sign(diagonal), precision=_HIGHEST)
        half_bin = self.pixels.half_bin
        log_mass = _log_bin_mass(self._blocks(images), e, half_bin / jnp.abs(diagonal), self.pixels)
        return jnp.sum(log_mass, axis=(-2, -1))

    def sample(self, key: PRNGKeyArray, scale: Scale, outputs: Outputs) -> Images:
        """f(z) + Q diag(σ) ε in each block."""
        shape = (*outputs.shape[:-3], self._num_blocks, *self.scale_shape)
        noise = scale * jax.random.normal(key, shape, outputs.dtype)
        directions = jnp.asarray(self.directions, outputs.dtype)
        return outputs + self._from_blocks(jnp.dot(noise, directions, precision=_HIGHEST))

    def _project(self, images: Images) -> Float[Array, "*b n d"]:
        """The components of each block along the directions."""
        directions = jnp.asarray(self.directions.T, images.dtype)
        return jnp.dot(self._blocks(images), directions, precision=_HIGHEST)

    def _blocks(self, images: Images) -> Float[Array, "*b n d"]:
        """The values of each block, ordered by row, column, channel."""
        s, (*batch, h, w, c) = self.block, images.shape
        blocks = images.reshape(*batch, h // s, s, w // s, s, c).swapaxes(-4, -3)
        return blocks.reshape(*batch, self._num_blocks, s * s * c)

    def _from_blocks(self, values: Float[Array, "*b n d"]) -> Images:
        """The inverse of `_blocks`."""
        s, (h, w, c), batch = self.block, self.image_shape, values.shape[:-2]
        blocks = values.reshape(*batch, h // s, w // s, s, s, c).swapaxes(-4, -3)
        return blocks.reshape(*batch, h, w, c)


@dataclass(frozen=True)
class GaussianBlocks(GaussianChannels):
    """One σ for each direction of a 2×2 block's values: its Hadamard basis ⊗ `channel_basis`.

    The directions of the block are the mean, the difference of columns, the difference of rows, and
    the difference of diagonals; each has all directions of the channels.
    """

    block: ClassVar[int] = 2

    def __post_init__(self):
        """Checks that blocks fill the image, too."""
        super().__post_init__()
        height, width, _ = self.image_shape
        if height % 2 or width % 2:
            raise ValueError(
                f"image_shape must have an even height and width for blocks of 2x2 pixels, got "
                f"{height}x{width}"
            )

    @property
    def directions(self) -> Float[np.ndarray, "d d"]:
        """Rows: orthonormal directions of a block's values."""
        pair = np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2.0)
        return np.kron(np.kron(pair, pair), super().directions)


def channel_basis(images: Num[np.ndarray, "n h w c"]) -> ChannelBasis:
    """The principal directions of the channels over all pixels: an orthonormal basis.

    Returns:
        The eigenvectors of the channels' covariance, largest variance first; in each, the entry of
        largest magnitude is positive.
    """
    num_channels = images.shape[-1]
    pixels = images.reshape(-1, num_channels)
    mean = np.mean(pixels, axis=0, dtype=np.float64)
    covariance = np.zeros((num_channels, num_channels))
    for start in range(0, len(pixels), 2**20):  # bounds the memory of the float64 copy
        centred = pixels[start : start + 2**20] - mean
        covariance += centred.T @ centred / len(pixels)
    rows = np.linalg.eigh(covariance).eigenvectors.T[::-1]
    largest = np.take_along_axis(rows, np.argmax(np.abs(rows), axis=1)[:, None], axis=1)
    return tuple(tuple(row) for row in (rows * np.sign(largest)).tolist())


def _is_orthonormal(rows: ChannelBasis, size: int) -> bool:
    if [len(row) for row in rows] != [size] * size:
        return False
    return np.allclose(np.matmul(rows, np.transpose(rows)), np.eye(size), atol=1e-6)


def _log_bin_mass(
    images: Float[Array, "*s"],
    d: Float[Array, "*s"],
    delta: Float[Array, "..."],
    pixels: PixelRange,
) -> Float[Array, "*s"]:
    return log_bin_mass(
        images, d, delta, pixels=pixels, log_interval=_log_interval, log_cdf=log_ndtr
    )


def _log_interval(d: Float[Array, "*s"], delta: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log(Φ(d + δ) − Φ(d − δ)), precise for narrow bins too."""
    # A difference of Φ loses digits in proportion to 1/δ; the density's Taylor series about d, to
    # second order, has a relative error of about (δ max(1, |d|))⁴/40. They meet at eps^(1/5).
    narrow = delta * jnp.maximum(1.0, jnp.abs(d)) < jnp.finfo(d.dtype).eps ** 0.2
    # Both branches are finite wherever the other one is taken, as gradients need.
    short = jnp.minimum(delta, 1.0)
    series = jnp.log(2 * short) - 0.5 * d**2 - 0.5 * math.log(2 * math.pi)
    series += jnp.log1p(short**2 * (d**2 - 1) / 6)
    wide = jnp.where(narrow, 1.0, delta)
    # Φ(d + δ) − Φ(d − δ) is even in d: taken in the lower tail, where log Φ is precise.
    upper, lower = log_ndtr(wide - jnp.abs(d)), log_ndtr(-wide - jnp.abs(d))
    return jnp.where(narrow, series, upper + jnp.log1p(-jnp.exp(lower - upper)))
