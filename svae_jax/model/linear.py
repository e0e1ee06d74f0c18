"""The linear path beside the networks: patches to latent means, and latents to patches.

With patches y of an image, one for each cell of the latent, and one basis for all cells,

    mean of q(z|x) += A y + a,    outputs of the decoder += B z + b.

`pca` gives A, B and the variances that make this model probabilistic PCA of the patches (Tipping
and Bishop 1999). With eigenvalues λ and directions U of the patches' covariance, and σ² the mean of
the eigenvalues that are left out,

    B = U √(λ − σ²),    b = E[y],    A = √(λ − σ²)/λ · Uᵀ,    a = −A b,    Var[z|x] = σ²/λ,

which is the exact posterior, with independent entries. A VAE with a linear decoder has this as its
optimum (Lucas et al. 2019, "Don't blame the ELBO!").

Patches tile a smaller image, from which bilinear interpolation grows the image. Where it has the
image's own size, there is no interpolation and the closed form is exact; else the small image is
the one whose interpolation is closest to the image, in the sense of least squares, and PCA is that
of its patches.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Float64

INITS = ("none", "random", "pca")

MAX_DIMS = 4096  # of a covariance; larger patches are taken from a smaller image

Cells = Float[Array, "*b h w p"]


class LinearPath(nn.Module):
    """The linear path of a model; its parameters are float32.

    Attributes:
        image_shape: height, width and channels of an image.
        height: rows h of cells.
        width: columns w of cells.
        maps: latent maps n.
        patch: rows and columns of a patch, in pixels of the small image.
    """

    image_shape: tuple[int, int, int]
    height: int
    width: int
    maps: int
    patch: tuple[int, int]

    def setup(self):
        """Creates A, a, B and b."""
        size = self.patch_size
        normal, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        self.to_mean = self.param("to_mean", normal, (size, self.maps))
        self.mean_bias = self.param("mean_bias", zeros, (self.maps,))
        self.to_patch = self.param("to_patch", normal, (self.maps, size))
        self.patch_bias = self.param("patch_bias", zeros, (size,))

    @property
    def patch_size(self) -> int:
        """P, the number of values of a patch."""
        return self.patch[0] * self.patch[1] * self.image_shape[2]

    @property
    def num_decoder_params(self) -> int:
        """The number of weights that lead to the image."""
        return (self.maps + 1) * self.patch_size

    def encode(self, images: Float[Array, "*b y x c"]) -> Float[Array, "*b h w n"]:
        """A y + a of each cell."""
        return _dot(self.patches(images), self.to_mean) + self.mean_bias

    def decode(self, z: Float[Array, "*b h w n"]) -> Float[Array, "*b y x c"]:
        """B z + b of each cell, as an image."""
        return self.image(_dot(z, self.to_patch) + self.patch_bias)

    def patches(self, images: Float[Array, "*b y x c"]) -> Cells:
        """The patches of the small image of each image, ``[*b, h, w, P]``."""
        shrink = [np.linalg.pinv(growth) for growth in self._growths()]
        small = _resize(images, *shrink)
        *batch, _, _, channels = small.shape
        rows, cols = self.patch
        tiles = small.reshape(*batch, self.height, rows, self.width, cols, channels)
        return jnp.moveaxis(tiles, -4, -3).reshape(*batch, self.height, self.width, -1)

    def image(self, patches: Cells) -> Float[Array, "*b y x c"]:
        """The image that grows from patches: the inverse of `patches` where sizes are equal."""
        *batch, height, width, _ = patches.shape
        tiles = patches.reshape(*batch, height, width, *self.patch, self.image_shape[2])
        tiles = jnp.moveaxis(tiles, -3, -4)
        small = tiles.reshape(*batch, height * self.patch[0], width * self.patch[1], -1)
        return _resize(small, *self._growths())

    def _growths(self) -> tuple[Float64[np.ndarray, "_y _h"], Float64[np.ndarray, "_x _w"]]:
        """Bilinear interpolation along rows and columns, from the small image to the image."""
        cells, (height, width, _) = (self.height, self.width), self.image_shape
        small = [n * side for n, side in zip(cells, self.patch, strict=True)]
        return interpolation(small[0], height), interpolation(small[1], width)


def interpolation(size: int, target: int) -> Float64[np.ndarray, "target size"]:
    """The matrix of bilinear interpolation from `size` to `target` ≥ `size` values."""
    centers = (np.arange(target) + 0.5) * size / target - 0.5
    low = np.clip(np.floor(centers), 0, max(size - 2, 0)).astype(int)
    share = np.clip(centers - low, 0, 1)
    matrix = np.zeros((target, size))
    matrix[np.arange(target), low] = 1 - share
    matrix[np.arange(target), np.minimum(low + 1, size - 1)] += share
    return matrix


def _resize(images: Array, rows: np.ndarray, cols: np.ndarray) -> Array:
    """Applies a matrix along the rows and one along the columns; none where it is the identity."""
    for matrix, axis in ((rows, -3), (cols, -2)):
        if matrix.shape[0] != matrix.shape[1]:
            matrix = matrix.astype(np.float32)
            images = jnp.moveaxis(_dot(jnp.moveaxis(images, axis, -1), matrix.T), -1, axis)
    return images


def _dot(x: Array, matrix: Array | np.ndarray) -> Array:
    """A product at full precision: accelerators would round its factors to fewer bits."""
    return jnp.dot(x, matrix, precision=lax.Precision.HIGHEST)


def patch_for(
    image_shape: tuple[int, int, int], height: int, width: int, maps: int, max_weights: float
) -> tuple[int, int]:
    """Rows and columns of the largest patch for which B has at most `max_weights` weights.

    The patches tile the image itself where they may be so large.

    Raises:
        ValueError: no patch is so small, or there are more cells than pixels along a side.
    """
    rows, cols = image_shape[0] // height, image_shape[1] // width
    if min(rows, cols) < 1:
        raise ValueError(f"{height}x{width} cells are more than {image_shape[:2]} pixels")
    channels = image_shape[2]
    while rows * cols * channels > min(MAX_DIMS, max_weights / maps):
        if rows == cols == 1:
            raise ValueError(
                f"{maps} maps need {maps * channels} weights at least, above {max_weights:,.0f}"
            )
        rows, cols = max(1, rows - (rows >= cols)), max(1, cols - (cols >= rows))
    return rows, cols


class PCA(NamedTuple):
    """Probabilistic PCA of patches, as parameters of a linear path; float64.

    Attributes:
        to_mean: A, ``[P, n]``.
        mean_bias: a, ``[n]``.
        to_patch: B, ``[n, P]``.
        patch_bias: b, ``[P]``.
        variances: Var[z|x] of each map, ``[n]``.
        sigma: σ in units of x in [-1, 1].
        num_components: how many maps have a direction; the others are white noise.
    """

    to_mean: Float64[np.ndarray, "p n"]
    mean_bias: Float64[np.ndarray, " n"]
    to_patch: Float64[np.ndarray, "n p"]
    patch_bias: Float64[np.ndarray, " p"]
    variances: Float64[np.ndarray, " n"]
    sigma: float
    num_components: int


class Moments(NamedTuple):
    """What PCA needs of the patches.

    Attributes:
        num_patches: how many.
        mean: E[y], ``[P]``.
        covariance: Cov[y], ``[P, P]``, over their number.
        residual: the mean squared distance, per pixel's channel, of images to what grows from their
            patches.
    """

    num_patches: int
    mean: Float64[np.ndarray, " p"]
    covariance: Float64[np.ndarray, "p p"]
    residual: float


def moments(path: LinearPath, batches: Iterable[Float[Array | np.ndarray, "_b y x c"]]) -> Moments:
    """Adds up the moments of the patches of all images, in float64 on the host.

    Args:
        path: which patches; its parameters are not used.
        batches: images in [-1, 1].
    """
    count, total, products, residual, num_values = 0, 0.0, 0.0, 0.0, 0
    shift: np.ndarray | None = None
    for batch in batches:
        patches = path.patches(jnp.asarray(batch))
        residual += float(jnp.sum(jnp.square(batch - path.image(patches))))
        num_values += batch.size
        rows = np.asarray(patches, np.float64).reshape(-1, path.patch_size)
        # Near the mean, sums of products lose no digits.
        shift = rows.mean(axis=0) if shift is None else shift
        rows = rows - shift
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
    if shift is None:
        raise ValueError("batches must hold at least one image, got none")
    offset = total / count
    covariance = np.asarray(products / count - np.multiply.outer(offset, offset))
    return Moments(count, shift + offset, covariance, residual / num_values)


def pca(path: LinearPath, found: Moments, min_sigma: float) -> PCA:
    """Probabilistic PCA from the moments of the patches, in closed form.

    Signs are fixed: the largest entry of each direction is positive.

    Args:
        path: its sizes.
        found: from `moments`.
        min_sigma: σ is at least so large.
    """
    values, vectors = np.linalg.eigh(found.covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    vectors = vectors * np.where(largest < 0, -1, 1)
    gains = _gains(path)
    kept = min(path.maps, path.patch_size, found.num_patches - 1)
    # σ² is the mean square over all dimensions that no component explains: those of the patches,
    # where noise of variance σ² in the image has σ²/gain, and what the small image lacks.
    cells, num_dims = path.height * path.width, math.prod(path.image_shape)
    lost = cells * gains * values[kept:].clip(0).sum() + num_dims * found.residual
    variance = lost / max(num_dims - cells * kept, 1)
    sigma = float(np.sqrt(max(variance, min_sigma**2)))
    floor = sigma**2 / gains
    lam = np.maximum(values[:kept], floor)
    scale = np.zeros(path.maps)
    scale[:kept] = np.sqrt(lam - floor)
    to_patch = np.zeros((path.maps, path.patch_size))
    to_patch[:kept] = scale[:kept, None] * vectors[:, :kept].T
    to_mean = np.zeros_like(to_patch)
    to_mean[:kept] = to_patch[:kept] / lam[:, None]
    variances = np.ones(path.maps)
    variances[:kept] = floor / lam
    bias = -to_mean @ found.mean
    return PCA(to_mean.T, bias, to_patch, found.mean, variances, sigma, kept)


def _gains(path: LinearPath) -> float:
    """How much larger the squared norm of an image is than that of its small image, on average."""
    rows, cols = path._growths()
    return float(np.mean(np.sum(rows**2, axis=0)) * np.mean(np.sum(cols**2, axis=0)))
