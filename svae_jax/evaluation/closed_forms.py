"""Closed forms: probabilistic PCA of training images, and the linear floors of a trained model.

A variational auto-encoder with a linear decoder has PCA as its optimum (Lucas et al. 2019), so a
model whose ELBO is below that of PCA with as many latents has not learned to use its networks.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from svae_jax import latents, terminal
from svae_jax import model as models
from svae_jax.devices import batches
from svae_jax.evaluation import bounds
from svae_jax.evaluation.estimates import Estimate
from svae_jax.likelihoods import Likelihood
from svae_jax.model import SpatialVAE, linear, networks
from svae_jax.model.linear import PCA, LinearPath, PatchMoments
from svae_jax.recipe import Recipe

Pixels = Num[np.ndarray, "_n h w c"]

_BATCH = 1000  # images at a time, or fewer large ones


class Floor(NamedTuple):
    """Probabilistic PCA, evaluated as a run is.

    Attributes:
        height: rows of cells; the patches of all cells have one basis.
        width: columns of cells.
        components: of the patch of a cell.
        decoder_params: weights and biases that lead to the image.
        elbo: nats an image, with the prior N(0, I). It is log p(x) itself where the noise is of one
            σ and patches tile the image. Else it is a lower bound: the posterior is that of PCA,
            and the scale, one for each direction where there are several, is fitted to it.
        bits_per_dim: of images of integers, else None.
    """

    height: int
    width: int
    components: int
    decoder_params: int
    elbo: Estimate
    bits_per_dim: Estimate | None


def fit(path: LinearPath, likelihood: Likelihood, images: Pixels, flip: bool = False) -> PCA:
    """Probabilistic PCA of the images' patches; it reads the images once, in batches."""
    pca = linear.pca(path, moments(path, likelihood, images, flip), likelihood.min_sigma)
    if pca.num_components < path.maps:
        logging.warning(
            "PCA has %d components for %d maps: no more directions of the %d images' patches of "
            "%d values vary more than the noise; the other maps start as white noise",
            *(pca.num_components, path.maps, len(images), path.patch_size),
        )
    return pca


def moments(
    path: LinearPath, likelihood: Likelihood, images: Pixels, flip: bool = False
) -> PatchMoments:
    """The moments of the images' patches.

    Args:
        path: which patches.
        likelihood: knows what the values of pixels mean.
        images: training images.
        flip: whether the images mirrored left to right count too.
    """
    rows, cols = path.patch
    small = path.height * rows, path.width * cols
    shrunk = "" if small == path.image_shape[:2] else f", shrunk to {small[0]}x{small[1]}"
    terminal.say(f"PCA of {rows}x{cols} patches of {len(images):,} training images{shrunk}")
    return linear.moments(path, _batches(likelihood, images, flip))


def floors(
    recipe: Recipe, training: Pixels, held_out: Pixels, mesh: Mesh, decoder_params: int
) -> dict[str, Floor]:
    """What PCA reaches with the same noise model and the prior N(0, I); see `Floor`.

    Args:
        recipe: of the trained model.
        training: images to which PCA is fitted.
        held_out: images on which it is evaluated.
        mesh: the devices.
        decoder_params: how many parameters the trained model's decoder has.

    Returns:
        By name, as far as there is one: `same latent`, the patches of the model's cells with as
        many components as it has maps; `as many latents` and `as large a decoder`, the image, or
        the largest patches of at most `linear.MAX_DIMS` values; and `Gaussian of the pixels`, or
        `of patches`, all components of these. Each once, under its first name. Nothing where the
        likelihood has no optimal σ.
    """
    if not recipe.likelihood.has_optimal:
        return {}
    noise = dataclasses.replace(recipe.likelihood, sigma="optimal")
    found: dict[str, Floor] = {}
    known: dict[tuple[int, int], PatchMoments] = {}
    for name, path in _paths(recipe.model, noise, decoder_params).items():
        cells = path.height, path.width
        if cells not in known:
            known[cells] = moments(path, noise, training, recipe.flip)
        pca = linear.pca(path, known[cells], noise.min_sigma)
        closed, variables = as_run(recipe, path, noise, pca)
        scale = np.asarray(pca.sigma, np.float32)
        if not models.is_exact_at_pca(closed.model):
            scale = bounds.calibrate(closed, variables, training, mesh)
        means = bounds.estimate(closed, variables, held_out, scale, mesh)
        size = (*cells, path.maps, path.num_decoder_params)
        found[name] = Floor(*size, means["elbo"], means.get("bits_per_dim"))
    return found


def _paths(model: SpatialVAE, noise: Likelihood, decoder_params: int) -> dict[str, LinearPath]:
    """The linear paths of the floors, by name, all of them different."""
    posterior, cells = model.posterior, _cells(noise.image_shape)
    num_cells = cells[0] * cells[1]
    size = math.prod(noise.image_shape) // num_cells
    wanted = {
        "same latent": posterior.shape,
        "as many latents": (*cells, model.num_latents // num_cells),
        "as large a decoder": (*cells, decoder_params // size - 1),
        f"Gaussian of {'the pixels' if num_cells == 1 else 'patches'}": (*cells, size - 1),
    }
    paths: dict[str, LinearPath] = {}
    for name, latent in wanted.items():
        path = _path(noise.image_shape, *latent)
        if path is not None and path not in paths.values():
            paths[name] = path
    return paths


def _path(
    image_shape: tuple[int, int, int], height: int, width: int, components: int
) -> LinearPath | None:
    """The largest patches for these cells, with fewer components than they have values, if any."""
    if components < 1:
        return None
    try:
        patch = linear.patch_for(image_shape, height, width, components, math.inf)
    except ValueError:  # more cells than pixels
        return None
    components = min(components, max(math.prod(patch) * image_shape[2] - 1, 1))
    return LinearPath(image_shape, height, width, components, patch)


def _cells(image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """The fewest equal cells whose patches have at most `MAX_DIMS` values."""
    height, width, _ = image_shape
    dims = math.prod(image_shape)
    divisors = [(h, w) for h in _divisors(height) for w in _divisors(width)]
    fits = [(h, w) for h, w in divisors if dims // (h * w) <= linear.MAX_DIMS]
    return min(fits, key=lambda cell: (cell[0] * cell[1], abs(cell[0] - cell[1])))


def _divisors(size: int) -> Iterable[int]:
    return (i for i in range(1, size + 1) if size % i == 0)


def as_run(
    recipe: Recipe, path: LinearPath, noise: Likelihood, pca: PCA
) -> tuple[Recipe, dict[str, Any]]:
    """PCA as a model of the recipe without networks, and its variables.

    Args:
        recipe: all but the model is taken from it.
        path: the patches.
        noise: p(x|z).
        pca: of these patches.
    """
    size: dict[str, Any] = {"height": path.height, "width": path.width, "maps": path.maps}
    posterior = latents.make("naive", **size)
    prior = latents.make_prior("standard", **size)
    encoder, decoder = networks.Constant(posterior), networks.Zero(noise)
    model = SpatialVAE(posterior, encoder, decoder, prior, noise, path)
    variables = models.init(model, jax.random.key(0), noise.image_shape)
    variables["params"] = models.start_at_pca(model, variables["params"], pca)
    return recipe._replace(model=model), variables


def _batches(
    likelihood: Likelihood, images: Pixels, flip: bool
) -> Iterator[Float[Array, "_b h w c"]]:
    size = batches.size_for(likelihood.image_shape, min(_BATCH, len(images)))
    for batch in batches.split(images, size):
        floats = likelihood.pixels.to_float(batch.rows)[: batch.size]
        yield floats
        if flip:
            yield floats[:, :, ::-1]
