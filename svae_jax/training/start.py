"""The state before the first training step, where the model starts at probabilistic PCA."""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, PyTree

from svae_jax.devices import sharding
from svae_jax.errors import UserError
from svae_jax.model import linear, start_at_pca
from svae_jax.model.linear import PCA
from svae_jax.recipe import Recipe
from svae_jax.samplers import MOST_LATENTS, aggregate
from svae_jax.training.job import Job, Pixels
from svae_jax.training.step import TrainState

_BATCH = 1000  # images at a time
_MOST_ENCODED = 10_000  # training images to whose latents a learned prior is fitted


def initial(job: Job, state: TrainState) -> TrainState:
    """The state before the first step: `state`, or that of a model that is PCA.

    One process fits and gives the result to all, so that all start with the same bits. A restored
    state is never fitted again.
    """
    if job.config.model.linear != "pca":
        return state
    if job.config.objective.beta_warmup_steps:
        logging.warning(
            "model.linear='pca' starts at a trained model; objective.beta_warmup_steps=%d lets its "
            "KL grow first",
            job.config.objective.beta_warmup_steps,
        )
    params = jax.device_get(state.params)
    if jax.process_index() == 0:
        found = fit(job.recipe, job.train_images)
        try:
            params = start_at_pca(job.recipe.model, params, found)
        except ValueError as error:
            raise UserError(f"model.{error}") from None
        prior: Any = job.recipe.model.prior
        # A user's own prior may have no such closed form, which takes a covariance of all latents.
        few = job.recipe.model.num_latents <= MOST_LATENTS
        if hasattr(prior, "of_moments") and few:
            params["prior"] = fit_prior(job, prior, params, jax.device_get(state.batch_stats))
    if jax.process_count() > 1:
        params = multihost_utils.broadcast_one_to_all(params)
    params = _replicated(job, params)
    ema = state.ema
    if ema is not None:
        ema = {**ema, "params": _replicated(job, jax.device_get(params))}
    return state._replace(params=params, ema=ema)


def fit(recipe: Recipe, images: Pixels) -> PCA:
    """Probabilistic PCA of the training images' patches; it reads them once, in batches."""
    path = recipe.model.linear
    assert path is not None  # the configuration gives it
    print(f"PCA of {len(images):,} training images", file=sys.stderr, flush=True)
    moments = linear.moments(path, _batches(recipe, images))
    found = linear.pca(path, moments, recipe.likelihood.min_sigma)
    if found.num_components < path.maps:
        logging.warning(
            "PCA has %d components for %d maps: %d patches of %d values; the other maps start as "
            "white noise",
            *(found.num_components, path.maps, moments.num_patches, path.patch_size),
        )
    return found


def fit_prior(job: Job, prior: Any, params: PyTree, batch_stats: PyTree) -> PyTree:
    """The prior's parameters at the moments of the aggregate posterior of training images."""
    model, images = job.recipe.model, job.train_images
    count = min(_MOST_ENCODED, len(images))
    chosen = images[np.linspace(0, len(images) - 1, count).astype(int)]
    variables = {"params": params, "batch_stats": batch_stats}
    moments = aggregate.moments(aggregate.encode(model, variables, chosen))
    shape = (model.posterior.height, model.posterior.width, model.posterior.maps)
    return prior.of_moments(moments.mean.reshape(shape), moments.covariance)


def _batches(recipe: Recipe, images: Pixels) -> Iterator[Float[Array, "_b h w c"]]:
    for begin in range(0, len(images), _BATCH):
        yield recipe.likelihood.pixels.to_float(np.asarray(images[begin : begin + _BATCH]))


def _replicated(job: Job, tree: PyTree) -> Any:
    where = sharding.replicated(job.mesh)
    return jax.tree.map(lambda leaf: sharding.put(np.array(leaf), where), tree)
