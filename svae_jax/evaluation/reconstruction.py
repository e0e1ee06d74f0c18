"""All metrics of a split, and how much of the latent a model uses."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, PyTree

from svae_jax.evaluation import metrics, per_image, steps
from svae_jax.evaluation.estimates import Estimate
from svae_jax.recipe import Recipe, stream

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016


class LatentUse(NamedTuple):
    """What the latents z `[h, w, n]` carry.

    An entry is active if its posterior mean has a variance above 0.01 over the images.

    Attributes:
        active_units: number of active entries, of h·w·n.
        active_per_map: active entries of each map, of h·w.
        active_per_location: active entries at each location, of n.
        kl_per_map: nats an image, with standard errors below; sums to the KL.
        kl_per_map_error: their standard errors over images.
        kl_per_location: nats an image of each location: with the standard prior the KL of the
            entries' marginals, with a learned one that given the locations before. Sums to the
            KL, except for `mvn_full` and `lowrank_full`, where it sums to less.
        kl_per_location_error: its standard errors over images.
    """

    active_units: int
    active_per_map: Int[np.ndarray, " n"]
    active_per_location: Int[np.ndarray, "h w"]
    kl_per_map: Float[np.ndarray, " n"]
    kl_per_map_error: Float[np.ndarray, " n"]
    kl_per_location: Float[np.ndarray, "h w"]
    kl_per_location_error: Float[np.ndarray, "h w"]


def evaluate(
    recipe: Recipe,
    variables: PyTree,
    images: Num[np.ndarray, "n h w c"],
    scale: Float[np.ndarray, "*k"],
    mesh: Mesh,
) -> tuple[dict[str, dict[str, Estimate]], LatentUse]:
    """Evaluates all images in one pass, with the samples of z that `bounds.terms` takes.

    Args:
        recipe: what was trained.
        variables: the evaluated variables.
        images: held-out images.
        scale: σ, from `bounds.calibrate`.
        mesh: the devices.

    Returns:
        By section, all metrics of `per_image.METRICS`, and in `reconstruction` also `psnr_of_mse`,
        decibels of the mean `mse`, which are lower, since errors differ between images; and what
        the latents carry.
    """
    names = per_image.names(recipe.likelihood, in_training=False)

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        given = (recipe.model, variables, key, batch, jnp.asarray(scale))
        return steps.eval_step(*given, names, True)

    key = stream(recipe.seed, "eval")
    found = metrics.over_images(evaluate_batch, key, images, recipe.batch_size, mesh)
    sections: dict[str, dict[str, Estimate]] = {"bounds": {}, "reconstruction": {}}
    for name in names:
        sections[per_image.METRICS[name].section][name] = found[name].estimate()
    mse = sections["reconstruction"]["mse"]
    # The derivative of 10 log10(mse) is 10 / (log 10 · mse).
    sections["reconstruction"]["psnr_of_mse"] = Estimate(
        10 * math.log10(4 / mse.value), 10 / math.log(10) * mse.standard_error / mse.value
    )
    active = found["posterior_mean"].variance > ACTIVE_VARIANCE
    kl_map, kl_location = found["kl_per_map"], found["kl_per_location"]
    return sections, LatentUse(
        int(active.sum()),
        active.sum(axis=(0, 1)),
        active.sum(axis=2),
        kl_map.mean,
        kl_map.standard_error,
        kl_location.mean,
        kl_location.standard_error,
    )
