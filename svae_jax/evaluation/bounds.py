"""Held-out bounds on log p(x), with a σ that is fixed before any held-out image is seen."""

import math
from collections.abc import Callable, Mapping

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, UInt8

from svae_jax.devices import sharding
from svae_jax.evaluation import metrics, steps
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
    means = _means(evaluate_batch, recipe, key, images, mesh)
    mean_squared_error = means["squared_error"] / math.prod(recipe.image_shape)
    return float(objective.optimal_sigma(jnp.asarray(mean_squared_error)))


def evaluate(
    recipe: Recipe, variables: PyTree, images: Pixels, sigma: float, mesh: Mesh
) -> dict[str, float]:
    """Evaluates all images with one sample of z each.

    Args:
        recipe: what was trained.
        variables: the evaluated variables.
        images: held-out images.
        sigma: from `fixed_sigma`.
        mesh: the devices.

    Returns:
        `elbo`, `reconstruction` and `kl` in nats an image (β = 1, no free bits), `bits_per_dim` of
        the 8-bit images, `sigma`, and whatever else `steps.eval_step` returns.
    """

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        return steps.eval_step(recipe.model, variables, key, batch, sigma)

    key = stream(recipe.seed, "eval")
    means = _means(evaluate_batch, recipe, key, images, mesh)
    del means["squared_error"]  # only for `fixed_sigma`
    bits_per_dim = _bits_per_dim(recipe, means.pop("elbo_discretized"))
    return {"elbo": means.pop("elbo"), "bits_per_dim": bits_per_dim, **means, "sigma": sigma}


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
        `elbo_iw` in nats an image, and `bits_per_dim_iw` of the 8-bit images.
    """

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        chunk = min(chunk_size, num_samples)
        density, discretized = steps.importance_weighted_step(
            recipe.model, variables, key, batch, sigma, num_samples, chunk
        )
        return {"density": density, "discretized": discretized}

    key = stream(recipe.seed, "eval")
    means = _means(evaluate_batch, recipe, key, images, mesh)
    return {
        "elbo_iw": means["density"],
        "bits_per_dim_iw": _bits_per_dim(recipe, means["discretized"]),
    }


def _bits_per_dim(recipe: Recipe, nats: float) -> float:
    return float(objective.bits_per_dim(nats, math.prod(recipe.image_shape)))


def _means(
    evaluate_batch: Callable[[PRNGKeyArray, Array], Mapping[str, Array]],
    recipe: Recipe,
    key: PRNGKeyArray,
    images: Pixels,
    mesh: Mesh,
) -> dict[str, float]:
    """The means over all images: summed in batches, on the device, and divided once."""
    totals: clu.metrics.Collection | None = None
    size = recipe.batch_size
    for i in range(-(-len(images) // size)):
        # The last batch is filled up with its own images again, which the mask leaves out.
        rows = np.arange(i * size, (i + 1) * size)
        mask = sharding.put(rows < len(images), sharding.split_batch(mesh))
        batch = sharding.put_rows(images, np.minimum(rows, len(images) - 1), mesh)
        values = dict(evaluate_batch(jax.random.fold_in(key, i), batch))
        totals = _add(totals or metrics.averages(*sorted(values)).empty(), mask, values)
    assert totals is not None  # a split holds at least one image
    return {name: float(value) for name, value in totals.compute().items()}


@jax.jit
def _add(
    totals: clu.metrics.Collection, mask: Bool[Array, " b"], values: dict[str, Array]
) -> clu.metrics.Collection:
    return totals.merge(type(totals).single_from_model_output(mask=mask, **values))
