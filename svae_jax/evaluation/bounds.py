"""Held-out bounds on log p(x), with a σ that is fixed before any held-out image is seen."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree, UInt8

from svae_jax.evaluation import metrics, steps
from svae_jax.evaluation.estimates import Estimate
from svae_jax.model import objective
from svae_jax.recipe import Recipe, stream

# Training images whose root mean squared error is σ for `optimal` and `released_code`.
NUM_SIGMA_IMAGES = 2000

Pixels = UInt8[np.ndarray, "n h w c"]


def held_out(
    recipe: Recipe,
    variables: PyTree,
    train_images: UInt8[np.ndarray, "m h w c"],
    eval_images: Pixels,
    mesh: Mesh,
) -> dict[str, float]:
    """Fixes σ on training images, then evaluates on held-out ones."""
    sigma = fixed_sigma(recipe, variables, train_images, mesh)
    return evaluate(recipe, variables, eval_images, sigma, mesh)


def fixed_sigma(recipe: Recipe, variables: PyTree, train_images: Pixels, mesh: Mesh) -> float:
    """The likelihood's σ for evaluation, in units of x in [-1, 1].

    It is the given or the learned number, and else the root mean squared error of the evaluated
    parameters on the first 2,000 training images. Refitting it to held-out images, or to each of
    them, would exceed the likelihood that it claims to bound.
    """
    if recipe.objective.learns_sigma:
        return math.exp(float(variables["params"]["log_sigma"]))
    if recipe.objective.fixed_sigma is not None:
        return recipe.objective.fixed_sigma

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        return steps.eval_step(recipe.model, variables, key, batch, 1.0)

    key, images = stream(recipe.seed, "sigma"), train_images[:NUM_SIGMA_IMAGES]
    outputs = metrics.over_images(evaluate_batch, key, images, recipe.batch_size, mesh)
    mean_squared_error = outputs["squared_error"].mean / math.prod(recipe.image_shape)
    return float(objective.optimal_sigma(jnp.asarray(mean_squared_error, jnp.float32)))


def evaluate(
    recipe: Recipe, variables: PyTree, images: Pixels, sigma: float, mesh: Mesh
) -> dict[str, float]:
    """The values of `estimate`, and `sigma`."""
    found = estimate(recipe, variables, images, sigma, mesh)
    return {**{name: figure.value for name, figure in found.items()}, "sigma": sigma}


def estimate(
    recipe: Recipe, variables: PyTree, images: Pixels, sigma: float, mesh: Mesh
) -> dict[str, Estimate]:
    """Evaluates all images with one sample of z each.

    Args:
        recipe: what was trained.
        variables: the evaluated variables.
        images: held-out images.
        sigma: from `fixed_sigma`.
        mesh: the devices.

    Returns:
        `elbo`, `reconstruction` and `kl` in nats an image (β = 1, no free bits), `bits_per_dim` of
        the 8-bit images, and whatever else `steps.eval_step` returns. Each is a mean over images,
        with its standard error.
    """

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        return steps.eval_step(recipe.model, variables, key, batch, sigma)

    means = _means(evaluate_batch, recipe, images, mesh)
    del means["squared_error"]  # only for `fixed_sigma`
    bits_per_dim = _bits_per_dim(recipe, means.pop("elbo_discretized"))
    return {"elbo": means.pop("elbo"), "bits_per_dim": bits_per_dim, **means}


def importance_weighted(
    recipe: Recipe,
    variables: PyTree,
    images: Pixels,
    sigma: float,
    mesh: Mesh,
    *,
    num_samples: int,
    chunk_size: int = 1,
) -> dict[str, float]:
    """The values of `estimate_importance_weighted`."""
    given = (recipe, variables, images, sigma, mesh)
    found = estimate_importance_weighted(*given, num_samples=num_samples, chunk_size=chunk_size)
    return {name: figure.value for name, figure in found.items()}


def estimate_importance_weighted(
    recipe: Recipe,
    variables: PyTree,
    images: Pixels,
    sigma: float,
    mesh: Mesh,
    *,
    num_samples: int,
    chunk_size: int = 1,
) -> dict[str, Estimate]:
    """The importance-weighted bound of K = `num_samples` samples on all images.

    Args:
        recipe: what was trained.
        variables: the evaluated variables.
        images: held-out images.
        sigma: from `fixed_sigma`.
        mesh: the devices.
        num_samples: K.
        chunk_size: samples of each image of a batch that are decoded at a time.

    Returns:
        `elbo_iw` in nats an image, and `bits_per_dim_iw` of the 8-bit images, each with its
        standard error over images.
    """

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        chunk = min(chunk_size, num_samples)
        density, discretized = steps.importance_weighted_step(
            recipe.model, variables, key, batch, sigma, num_samples, chunk
        )
        return {"density": density, "discretized": discretized}

    means = _means(evaluate_batch, recipe, images, mesh)
    return {
        "elbo_iw": means["density"],
        "bits_per_dim_iw": _bits_per_dim(recipe, means["discretized"]),
    }


def _means(
    evaluate_batch: Callable[[PRNGKeyArray, Array], dict[str, Array]],
    recipe: Recipe,
    images: Pixels,
    mesh: Mesh,
) -> dict[str, Estimate]:
    key = stream(recipe.seed, "eval")
    outputs = metrics.over_images(evaluate_batch, key, images, recipe.batch_size, mesh)
    return {name: output.estimate() for name, output in outputs.items()}


def _bits_per_dim(recipe: Recipe, nats: Estimate) -> Estimate:
    return nats.scaled(float(objective.bits_per_dim(1.0, math.prod(recipe.image_shape))))
