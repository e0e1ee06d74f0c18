"""The state before the first training step, where the model starts at probabilistic PCA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, PyTree

from svae_jax import likelihoods
from svae_jax.devices import batches, sharding
from svae_jax.devices.batches import Batch
from svae_jax.evaluation import bounds, closed_forms, steps
from svae_jax.latents import Prior
from svae_jax.latents.base import StartsAtMoments, StartsAtNeighbourhoods
from svae_jax.model import is_exact_at_pca, start_at_pca
from svae_jax.recipe import stream
from svae_jax.samplers import MOST_LATENTS, aggregate
from svae_jax.training.job import Job
from svae_jax.training.step import TrainState

_MOST_ENCODED = 10_000  # training images to whose latents a learned prior is fitted
_BATCH = 200  # images at a time, or fewer large ones


def initial(job: Job, state: TrainState) -> TrainState:
    """The state before the first step: `state`, or that of a model that is PCA.

    One process fits and gives the result to all, so that all start with the same bits. A restored
    state is never fitted again.
    """
    if job.config.model.linear != "pca":
        return state
    if job.config.objective.beta_warmup_steps:
        logging.warning(
            "model.linear='pca' starts at a fitted model, and objective.beta_warmup_steps=%d, with "
            "little weight on the KL at first, leads away from it; set it to 0",
            job.config.objective.beta_warmup_steps,
        )
    path, params = job.recipe.model.linear, jax.device_get(state.params)
    assert path is not None  # the configuration gives it
    if jax.process_index() == 0:
        pca = closed_forms.fit(path, job.recipe.likelihood, job.train_images, job.recipe.flip)
        params = start_at_pca(job.recipe.model, params, pca)
        batch_stats = jax.device_get(state.batch_stats)
        if job.recipe.likelihood.learns_scale and not is_exact_at_pca(job.recipe.model):
            params["log_sigma"] = jnp.log(fit_scale(job, params, batch_stats))
        prior = job.recipe.model.prior
        if prior.shapes and (reason := _lacks_start(job.recipe.model.num_latents, prior)):
            logging.warning("latent.prior=%s starts at N(0, I): %s", prior.name, reason)
        elif prior.shapes:
            params["prior"] = fit_prior(job, prior, params, batch_stats)
    if jax.process_count() > 1:
        params = multihost_utils.broadcast_one_to_all(params)
    params = _replicated(job, params)
    ema = state.ema
    if ema is not None:
        ema = {**ema, "params": _replicated(job, jax.device_get(params))}
    return state._replace(params=params, ema=ema)


def _lacks_start(num_latents: int, prior: Prior) -> str:
    """Why a learned prior cannot start at the moments of the aggregate posterior, if it cannot."""
    if isinstance(prior, StartsAtNeighbourhoods):
        return ""
    if not isinstance(prior, StartsAtMoments):
        return "it has no method of_moments"
    if num_latents > MOST_LATENTS:
        return f"moments of {num_latents:,} latents are more than the {MOST_LATENTS:,} that fit"
    return ""


def fit_scale(job: Job, params: PyTree, batch_stats: PyTree) -> Float[Array, "*d"]:
    """The scale of the noise that the model leaves on training images, in units of x.

    It is the optimal one, where that has a closed form, and else that of a noise of the same
    standard deviation. PCA's σ is that of its own posterior and of one Gaussian noise.
    """
    likelihood, unit = _with_optimal(job.recipe.likelihood)
    model = job.recipe.model.clone(likelihood=likelihood)
    variables = {"params": params, "batch_stats": batch_stats}
    key = stream(job.recipe.seed, "sigma")
    images = job.train_images[: bounds.NUM_SIGMA_IMAGES]

    def error(batch: Batch) -> Float[Array, "b *k"]:
        batch_key = jax.random.fold_in(key, batch.begin)
        return steps.error_step(model, variables, batch_key, batch.rows)

    size = batches.size_for(job.recipe.image_shape, min(_BATCH, len(images)))
    errors = batches.gather(error, images, size)
    return likelihood.optimal_scale(jnp.mean(errors, axis=0)) / unit


def _with_optimal(likelihood: likelihoods.Likelihood) -> tuple[likelihoods.Likelihood, float]:
    """A likelihood whose optimal scale is known, and by what to divide that scale."""
    if likelihood.has_optimal:
        return dataclasses.replace(likelihood, sigma="optimal"), 1.0
    shape, pixels = likelihood.image_shape, likelihood.pixels
    gaussian = likelihoods.make("gaussian", image_shape=shape, pixels=pixels)
    return gaussian, likelihood.unit_stddev


def fit_prior(job: Job, prior: Prior, params: PyTree, batch_stats: PyTree) -> PyTree:
    """The prior's parameters at the moments of the aggregate posterior of training images."""
    model, images = job.recipe.model, job.train_images
    variables = {"params": params, "batch_stats": batch_stats}
    # Evenly spaced; each mirrored too where training flips them.
    chosen = np.linspace(0, len(images) - 1, min(_MOST_ENCODED, len(images))).astype(int)
    which: dict[str, Any] = {"chosen": chosen, "mirrored": job.recipe.flip}
    if isinstance(prior, StartsAtNeighbourhoods):
        found = aggregate.neighbourhoods(model, variables, images, prior, **which)
        return prior.of_neighbourhoods(found.mean, found.sums)
    assert isinstance(prior, StartsAtMoments)  # see `_lacks_start`
    moments = aggregate.moments(aggregate.encode(model, variables, images, **which))
    mean = moments.mean.reshape(model.posterior.shape)
    return prior.of_moments(mean, moments.covariance)


def _replicated(job: Job, tree: PyTree) -> Any:
    where = sharding.replicated(job.mesh)
    return jax.tree.map(lambda leaf: sharding.put(np.array(leaf), where), tree)
