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
from svae_jax.evaluation import bounds
from svae_jax.evaluation.estimates import Estimate
from svae_jax.likelihoods import Likelihood
from svae_jax.model import SpatialVAE, linear, networks
from svae_jax.model.linear import PCA, LinearPath, Moments
from svae_jax.recipe import Recipe

Pixels = Num[np.ndarray, "_n h w c"]

_BATCH = 1000  # images at a time


class Floor(NamedTuple):
    """Probabilistic PCA, evaluated as a run is.

    Attributes:
        height: rows of cells; the patches of all cells have one basis.
        width: columns of cells.
        components: of the patch of a cell.
        decoder_params: weights and biases that lead to the image.
        elbo: nats an image; log p(x) itself where the likelihood has one σ and patches tile the
            image.
        bits_per_dim: of images of integers, else None.
    """

    height: int
    width: int
    components: int
    decoder_params: int
    elbo: Estimate
    bits_per_dim: Estimate | None


def fit(path: LinearPath, likelihood: Likelihood, images: Pixels) -> PCA:
    """Probabilistic PCA of the images' patches; it reads the images once, in batches."""
    found = linear.pca(path, moments(path, likelihood, images), likelihood.min_sigma)
    if found.num_components < path.maps:
        logging.warning(
            "PCA has %d components for %d maps: %d images with patches of %d values; the other "
            "maps start as white noise",
            *(found.num_components, path.maps, len(images), path.patch_size),
        )
    return found


def moments(path: LinearPath, likelihood: Likelihood, images: Pixels) -> Moments:
    """The moments of the images' patches."""
    rows, cols = path.patch
    small = path.height * rows, path.width * cols
    shrunk = "" if small == path.image_shape[:2] else f", shrunk to {small[0]}x{small[1]}"
    terminal.say(f"PCA of {rows}x{cols} patches of {len(images):,} training images{shrunk}")
    return linear.moments(path, _batches(likelihood, images))


def floors(
    recipe: Recipe, training: Pixels, held_out: Pixels, mesh: Mesh, decoder_params: int
) -> dict[str, Floor]:
    """What PCA reaches with the same noise model, its σ fitted to training images.

    Args:
        recipe: of the trained model.
        training: images to which PCA is fitted.
        held_out: images on which it is evaluated.
        mesh: the devices.
        decoder_params: how many parameters the trained model's decoder has.

    Returns:
        By name, as far as there is one: `same latent`, the patches of the model's cells with as
        many components as it has maps; `as many latents` and `as large a decoder`, the image, or
        the largest patches of at most `linear.MAX_DIMS` values; and `Gaussian of the pixels`, all
        components of these. Nothing where the likelihood has no optimal σ.
    """
    likelihood, posterior = recipe.likelihood, recipe.model.posterior
    if not likelihood.has_optimal:
        return {}
    noise = dataclasses.replace(likelihood, sigma="optimal")
    cells = _cells(noise.image_shape)
    size = math.prod(noise.image_shape) // (cells[0] * cells[1])
    latent = (posterior.height, posterior.width)
    wanted = {
        "same latent": (*latent, posterior.maps),
        "as many latents": (*cells, recipe.model.num_latents // (cells[0] * cells[1])),
        "as large a decoder": (*cells, decoder_params // size - 1),
        "Gaussian of the pixels": (*cells, size - 1),
    }
    found: dict[str, Floor] = {}
    known: dict[tuple[int, int], Moments] = {}
    for name, (height, width, components) in wanted.items():
        most = max(math.prod(noise.image_shape) // (height * width) - 1, 1)
        components = min(components, most)
        if components < 1:
            continue
        patch = linear.patch_for(noise.image_shape, height, width, components, math.inf)
        path = LinearPath(noise.image_shape, height, width, components, patch)
        if (height, width) not in known:
            known[height, width] = moments(path, noise, training)
        pca = linear.pca(path, known[height, width], noise.min_sigma)
        closed, variables = as_run(recipe, path, noise, pca)
        scale = bounds.calibrate(closed, variables, training, mesh)
        means = bounds.estimate(closed, variables, held_out, scale, mesh)
        bits = means.get("bits_per_dim")
        found[name] = Floor(
            *wanted[name][:2], components, path.num_decoder_params, means["elbo"], bits
        )
    return found


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
    size = {"height": path.height, "width": path.width, "maps": path.maps}
    posterior = latents.make("naive", **size)
    prior = latents.make_prior("standard", **size)
    none: Any = networks.Constant(posterior), networks.Zero(noise)
    model = SpatialVAE(posterior, *none, prior, noise, path)
    variables = models.init(model, jax.random.key(0), noise.image_shape)
    variables["params"] = models.start_at_pca(model, variables["params"], pca)
    return recipe._replace(model=model), variables


def _batches(likelihood: Likelihood, images: Pixels) -> Iterator[Float[Array, "_b h w c"]]:
    for begin in range(0, len(images), _BATCH):
        yield likelihood.pixels.to_float(np.asarray(images[begin : begin + _BATCH]))
