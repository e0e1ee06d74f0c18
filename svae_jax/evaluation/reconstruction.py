"""Reconstruction quality, and how much of the latent a model uses, over a split."""

import math
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, PyTree

from svae_jax.evaluation import metrics, steps
from svae_jax.evaluation.estimates import Estimate
from svae_jax.recipe import Recipe, stream

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016


class Reconstruction(NamedTuple):
    """How well images are reconstructed from one sample of z each.

    Attributes:
        mse: mean squared error of a pixel's channel, in [-1, 1] (as σ²).
        psnr: decibels, the mean over images of each image's own.
        psnr_of_mse: decibels, of the mean `mse`; lower, since errors differ between images.
        ssim: structural similarity (Wang et al. 2004), the mean over channels and images.
    """

    mse: Estimate
    psnr: Estimate
    psnr_of_mse: Estimate
    ssim: Estimate


class LatentUse(NamedTuple):
    """What the latents z `[h, w, n]` carry.

    An entry is active if its posterior mean has a variance above 0.01 over the images.

    Attributes:
        active_units: number of active entries, of h·w·n.
        active_per_map: active entries of each map, of h·w.
        active_per_location: active entries at each location, of n.
        kl_per_map: nats an image, with standard errors below; sums to the KL.
        kl_per_map_error: their standard errors over images.
        kl_per_location: nats an image of the entries' marginals, summed over maps. Sums to
            the KL, except for `mvn_full` and `lowrank_full`, where it sums to less.
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
    recipe: Recipe, variables: PyTree, images: Num[np.ndarray, "n h w c"], mesh: Mesh
) -> tuple[Reconstruction, LatentUse]:
    """Evaluates all images, each once, with the samples of z that `bounds.evaluate` takes."""

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        return steps.reconstruction_step(recipe.model, variables, key, batch)

    key = stream(recipe.seed, "eval")
    found = metrics.over_images(evaluate_batch, key, images, recipe.batch_size, mesh)
    mse, psnr, ssim = (found[name].estimate() for name in ("mse", "psnr", "ssim"))
    # The derivative of 10 log10(mse) is 10 / (log 10 · mse).
    psnr_of_mse = Estimate(
        10 * math.log10(4 / mse.value), 10 / math.log(10) * mse.standard_error / mse.value
    )
    active = found["posterior_mean"].variance > ACTIVE_VARIANCE
    kl_map, kl_location = found["kl_per_map"], found["kl_per_location"]
    return Reconstruction(mse, psnr, psnr_of_mse, ssim), LatentUse(
        int(active.sum()),
        active.sum(axis=(0, 1)),
        active.sum(axis=2),
        kl_map.mean,
        kl_map.standard_error,
        kl_location.mean,
        kl_location.standard_error,
    )
