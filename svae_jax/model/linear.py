"""The linear path beside the networks: patches to latent means, and latents to patches.

With patches y of an image, one for each cell of the latent, and one basis for all cells,

    mean of q(z|x) += A y + a,    outputs of the decoder += B z + b.

`pca` gives A, B and the variances that make this model probabilistic PCA of the patches (Tipping
and Bishop 1999). With eigenvalues λ and directions U of the patches' covariance, and σ² the mean of
the eigenvalues that are left out,

    B = U √(λ − σ²),    b = E[y],    A = √(λ − σ²)/λ · Uᵀ,    a = −A b,    Var[z|x] = σ²/λ,

which is the exact posterior, with independent entries. A VAE with a linear decoder has this as its
optimum (Lucas et al. 2019, "Don't blame the ELBO!").

Patches tile a small image, from which bilinear interpolation makes the image. Where it has the
image's own size, there is no interpolation and the closed form is exact. Else the small image is
the least-squares inverse of the interpolation, PCA is of its patches, and a direction u of gain g,
the mean over cells of the squared norm of its image, has noise of variance σ²/g instead of σ².
"""

import functools
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
    def tiles(self) -> bool:
        """Whether the patches tile the image itself, without interpolation."""
        small = (self.height * self.patch[0], self.width * self.patch[1])
        return small == self.image_shape[:2]

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
        small = _resize(images, *(_inverse(*sizes) for sizes in self._sizes()))
        *batch, _, _, channels = small.shape
        rows, cols = self.patch
        tiles = small.reshape(*batch, self.height, rows, self.width, cols, channels)
        return jnp.moveaxis(tiles, -4, -3).reshape(*batch, self.height, self.width, -1)

    def image(self, patches: Cells) -> Float[Array, "*b y x c"]:
        """The image of patches: the inverse of `patches` where sizes are equal."""
        *batch, height, width, _ = patches.shape
        tiles = patches.reshape(*batch, height, width, *self.patch, self.image_shape[2])
        tiles = jnp.moveaxis(tiles, -3, -4)
        small = tiles.reshape(*batch, height * self.patch[0], width * self.patch[1], -1)
        return _resize(small, *self.upsampling())

    def upsampling(self) -> tuple[Float64[np.ndarray, "_y _h"], Float64[np.ndarray, "_x _w"]]:
        """Bilinear interpolation along rows and columns, from the small image to the image."""
        rows, cols = (interpolation(*sizes) for sizes in self._sizes())
        return rows, cols

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The rows of the small image and of the image, and their columns."""
        (height, width, _), (rows, cols) = self.image_shape, self.patch
        return (self.height * rows, height), (self.width * cols, width)


def interpolation(size: int, target: int) -> Float64[np.ndarray, "target size"]:
    """The matrix of bilinear interpolation from `size` to `target` ≥ `size` values."""
    centers = (np.arange(target) + 0.5) * size / target - 0.5
    low = np.clip(np.floor(centers), 0, max(size - 2, 0)).astype(int)
    share = np.clip(centers - low, 0, 1)
    matrix = np.zeros((target, size))
    matrix[np.arange(target), low] = 1 - share
    matrix[np.arange(target), np.minimum(low + 1, size - 1)] += share
    return matrix


@functools.lru_cache(maxsize=64)  # each tracing needs it, and 256 pixels take half a second
def _inverse(size: int, target: int) -> Float64[np.ndarray, "size target"]:
    """The least-squares inverse of `interpolation`; between equal sizes, that is the identity."""
    matrix = interpolation(size, target)
    inverse = matrix if size == target else np.linalg.pinv(matrix)
    inverse.setflags(write=False)
    return inverse


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
    """Rows and columns of the largest patch for which B and b have at most `max_weights` entries.

    The patches tile the image itself where they may be so large.

    Raises:
        ValueError: no patch is so small, or there are more cells than pixels along a side.
    """
    rows, cols = image_shape[0] // height, image_shape[1] // width
    if min(rows, cols) < 1:
        raise ValueError(f"{height}x{width} cells are more than {image_shape[:2]} pixels")
    channels = image_shape[2]
    while rows * cols * channels > min(MAX_DIMS, max_weights / (maps + 1)):
        if rows == cols == 1:
            raise ValueError(
                f"{maps} maps need {(maps + 1) * channels} weights and biases at least, above "
                f"{max_weights:,.0f}"
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
        num_components: how many maps have a direction whose variance is above the noise's; the
            others are white noise.
    """

    to_mean: Float64[np.ndarray, "p n"]
    mean_bias: Float64[np.ndarray, " n"]
    to_patch: Float64[np.ndarray, "n p"]
    patch_bias: Float64[np.ndarray, " p"]
    variances: Float64[np.ndarray, " n"]
    sigma: float
    num_components: int


class PatchMoments(NamedTuple):
    """What PCA needs of the patches; float64.

    Attributes:
        num_patches: how many.
        mean: E[y], ``[P]``.
        eigenvalues: λ of Cov[y], which is over the number of patches; descending, ``[P]``.
        directions: U, in rows, ``[P, P]``. The largest entry of each is positive.
        residual: the mean squared distance, per pixel's channel, of images to the images of their
            patches; 0 where patches tile the image.
    """

    num_patches: int
    mean: Float64[np.ndarray, " p"]
    eigenvalues: Float64[np.ndarray, " p"]
    directions: Float64[np.ndarray, "p p"]
    residual: float


def moments(
    path: LinearPath, batches: Iterable[Float[Array | np.ndarray, "_b y x c"]]
) -> PatchMoments:
    """Adds up the moments of the patches of all images, in float64 on the host.

    Args:
        path: which patches; its parameters are not used.
        batches: images in [-1, 1].

    Raises:
        ValueError: there is no batch.
    """
    count, total, products, residual, num_values = 0, 0.0, 0.0, 0.0, 0
    shift: np.ndarray | None = None
    for batch in batches:
        patches = path.patches(jnp.asarray(batch))
        if not path.tiles:
            error = np.asarray(batch - path.image(patches), np.float64)
            residual += float(np.sum(np.square(error)))
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
    return PatchMoments(count, shift + offset, *_eigen(covariance), residual / num_values)


def _eigen(
    covariance: Float64[np.ndarray, "p p"],
) -> tuple[Float64[np.ndarray, " p"], Float64[np.ndarray, "p p"]]:
    """Eigenvalues, descending, and directions in rows, of fixed signs."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0)
    return values, (vectors * np.where(largest < 0, -1, 1)).T


def pca(path: LinearPath, moments: PatchMoments, min_sigma: float) -> PCA:
    """Probabilistic PCA from the moments of the patches, in closed form.

    Args:
        path: its sizes.
        moments: of its patches.
        min_sigma: σ is at least so large.
    """
    values, directions, gains = moments.eigenvalues, moments.directions, _gains(path, moments)
    kept = min(path.maps, path.patch_size, moments.num_patches - 1)
    # σ² is the mean square over all dimensions that no component explains: those of the patches,
    # where noise of variance σ² in the image has σ²/gain, and what the small image lacks.
    cells, num_dims = path.height * path.width, math.prod(path.image_shape)
    lost = cells * (gains * values.clip(0))[kept:].sum() + num_dims * moments.residual
    variance = lost / max(num_dims - cells * kept, 1)
    sigma = float(np.sqrt(max(variance, min_sigma**2)))
    floor = sigma**2 / gains[:kept]
    lam = np.maximum(values[:kept], floor)
    scale = np.zeros(path.maps)
    scale[:kept] = np.sqrt(lam - floor)
    to_patch = np.zeros((path.maps, path.patch_size))
    to_patch[:kept] = scale[:kept, None] * directions[:kept]
    to_mean = np.zeros_like(to_patch)
    to_mean[:kept] = to_patch[:kept] / lam[:, None]
    # σ²/(gλ) = 1/(1 + ‖image of B_k‖²/σ²), the squared norm averaged over cells: of all variances
    # that are the same at all locations, the ones of highest ELBO.
    variances = np.ones(path.maps)
    variances[:kept] = floor / lam
    bias = -to_mean @ moments.mean
    num_components = int(np.count_nonzero(scale))
    return PCA(to_mean.T, bias, to_patch, moments.mean, variances, sigma, num_components)


def _gains(path: LinearPath, moments: PatchMoments) -> Float64[np.ndarray, " p"]:
    """The squared norm of the image of each direction, averaged over the cells it may be in."""
    if path.tiles:
        return np.ones(path.patch_size)
    rows, cols = (
        np.mean([part.T @ part for part in np.split(matrix, cells, axis=1)], axis=0)
        for matrix, cells in zip(path.upsampling(), (path.height, path.width), strict=True)
    )
    patches = moments.directions.reshape(-1, *path.patch, path.image_shape[2])
    images = np.einsum("kyxc,yv,xw->kvwc", patches, rows, cols, optimize=True)
    return np.sum(patches * images, axis=(1, 2, 3))
