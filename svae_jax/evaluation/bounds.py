"""Held-out bounds on log p(x), with a σ that is fixed before any held-out image is seen."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from svae_jax.devices import sharding
from svae_jax.evaluation import metrics, per_image, steps
from svae_jax.evaluation.estimates import Estimate
from svae_jax.likelihoods import Likelihood
from svae_jax.model import objective
from svae_jax.recipe import Recipe, stream

# Training images to which `optimal` σ is fitted for evaluation.
NUM_SIGMA_IMAGES = 2000

Pixels = Num[np.ndarray, "n h w c"]
Scale = Float[np.ndarray, "*k"]


def held_out(
    recipe: Recipe,
    variables: PyTree,
    train_images: Num[np.ndarray, "m h w c"],
    eval_images: Pixels,
    mesh: Mesh,
) -> dict[str, float]:
    """Fixes σ on training images, then evaluates on held-out ones."""
    scale = calibrate(recipe, variables, train_images, mesh)
    return terms(recipe, variables, eval_images, scale, mesh)


def calibrate(
    recipe: Recipe, variables: PyTree, train_images: Num[np.ndarray, "m h w c"], mesh: Mesh
) -> Scale:
    """The likelihood's scale σ for evaluation, in units of x in [-1, 1].

    It is the given or the learned one, and else the optimal one of the evaluated parameters on the
    first 2,000 training images. Refitting it to held-out images, or to each of them, would exceed
    the likelihood that it claims to bound.
    """
    likelihood = recipe.likelihood
    if (known := known_scale(likelihood, variables)) is not None:
        return known

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        return {"error": steps.error_step(recipe.model, variables, key, batch)}

    key, images = stream(recipe.seed, "sigma"), train_images[:NUM_SIGMA_IMAGES]
    outputs = metrics.over_images(evaluate_batch, key, images, recipe.batch_size, mesh)
    return np.asarray(likelihood.optimal_scale(jnp.asarray(outputs["error"].mean, jnp.float32)))


def known_scale(likelihood: Likelihood, variables: PyTree) -> Scale | None:
    """The scale that is given or learned; None for one that is fitted to training images."""
    if likelihood.learns_scale:
        return np.asarray(jnp.exp(variables["params"]["log_sigma"]))
    given = likelihood.given_scale
    return None if given is None else np.asarray(given)


def terms(
    recipe: Recipe, variables: PyTree, images: Pixels, scale: Scale, mesh: Mesh
) -> dict[str, float]:
    """The values of `estimate`, and the scale as `sigma` where there is one."""
    values = {
        name: found.value
        for name, found in estimate(recipe, variables, images, scale, mesh).items()
    }
    return values | sigma(recipe.likelihood, scale)


def sigma(likelihood: Likelihood, scale: Scale) -> dict[str, float]:
    """The scale by the names of metrics: `sigma`, and `sigma_0`, … where it has directions.

    `sigma` is one number for all of them (`Likelihood.reported_sigma`).
    """
    if not likelihood.has_scale:
        return {}
    directions = {f"sigma_{i}": float(value) for i, value in enumerate(scale.ravel())}
    overall = {"sigma": float(likelihood.reported_sigma(jnp.asarray(scale)))}
    return overall | (directions if scale.ndim else {})


def scale_of(
    likelihood: Likelihood, metrics: Mapping[str, float], prefix: str = ""
) -> Scale | None:
    """The inverse of `sigma`: the scale in metrics of these names; None if they hold none."""
    if not likelihood.has_scale:
        return np.asarray(likelihood.given_scale)
    shape = likelihood.scale_shape
    names = [f"{prefix}sigma_{i}" for i in range(math.prod(shape))] if shape else [f"{prefix}sigma"]
    if any(name not in metrics for name in names):
        return None
    return np.asarray([metrics[name] for name in names], np.float32).reshape(shape)


def estimate(
    recipe: Recipe, variables: PyTree, images: Pixels, scale: Scale, mesh: Mesh
) -> dict[str, Estimate]:
    """Evaluates all images with one sample of z each.

    Args:
        recipe: what was trained.
        variables: the evaluated variables.
        images: held-out images.
        scale: from `calibrate`.
        mesh: the devices.

    Returns:
        The metrics of `per_image.METRICS` that training evaluates. Each is a mean over images, with
        its standard error.
    """
    names = per_image.names(recipe.likelihood, in_training=True)

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        return steps.eval_step(recipe.model, variables, key, batch, jnp.asarray(scale), names)

    means = _means(evaluate_batch, recipe, images, mesh)
    return {name: means[name] for name in names}


def importance_weighted(
    recipe: Recipe,
    variables: PyTree,
    images: Pixels,
    scale: Scale,
    mesh: Mesh,
    *,
    num_samples: int,
    chunk_size: int = 1,
) -> dict[str, float]:
    """The values of `estimate_importance_weighted`."""
    given = (recipe, variables, images, scale, mesh)
    found, _ = estimate_importance_weighted(*given, num_samples=num_samples, chunk_size=chunk_size)
    return {name: figure.value for name, figure in found.items()}


class OtherPrior(NamedTuple):
    """A density of latents that takes the prior's place in a bound.

    Attributes:
        log_prob: the arrays and z ``[b, h, w, n]`` -> log p(z) ``[b]`` in nats; hashable.
        arrays: its arrays.
        exact: whether it is log p(z); False for unbiased estimates.
    """

    log_prob: steps.LogPrior
    arrays: PyTree
    exact: bool = True


def estimate_importance_weighted(
    recipe: Recipe,
    variables: PyTree,
    images: Pixels,
    scale: Scale,
    mesh: Mesh,
    *,
    num_samples: int,
    chunk_size: int = 1,
    priors: Mapping[str, OtherPrior] | None = None,
) -> tuple[dict[str, Estimate], dict[str, dict[str, Estimate]]]:
    """The importance-weighted bound of K = `num_samples` samples on all images.

    Args:
        recipe: what was trained.
        variables: the evaluated variables.
        images: held-out images.
        scale: from `calibrate`.
        mesh: the devices.
        num_samples: K.
        chunk_size: samples of each image of a batch that are decoded at a time.
        priors: by name, what takes the prior's place, with the same samples of z. The decoder
            stays as it is, so these are bounds on the likelihood of the models so composed.

    Returns:
        `elbo_iw` in nats an image, and for images of integers `bits_per_dim_iw`, each with its
        standard error over images; and by the names of `priors` both, and `elbo`, the mean over K.
        Of those that are estimates there is `elbo` alone, of one sample, since the others would not
        be bounds.
    """
    priors = priors or {}
    estimates = {n: prior._replace(exact=True) for n, prior in priors.items() if not prior.exact}
    priors = {name: prior for name, prior in priors.items() if prior.exact}
    replicated = sharding.replicated(mesh)
    arrays = tuple(
        jax.tree.map(lambda leaf: sharding.put(np.asarray(leaf), replicated), prior.arrays)
        for prior in priors.values()
    )
    log_priors = tuple(prior.log_prob for prior in priors.values())

    def evaluate_batch(key: PRNGKeyArray, batch: Array) -> dict[str, Array]:
        chunk = min(chunk_size, num_samples)
        given = (recipe.model, variables, key, batch, jnp.asarray(scale), num_samples, chunk)
        return steps.importance_weighted_step(*given, log_priors, arrays)

    means = _means(evaluate_batch, recipe, images, mesh)

    def of(suffix: str) -> dict[str, Estimate]:
        found = {"elbo_iw": means[f"density{suffix}"]}
        if (masses := f"discretized{suffix}") in means:
            found["bits_per_dim_iw"] = _bits_per_dim(recipe, means[masses])
        return found

    others = {name: {"elbo": means[f"elbo_{i}"]} | of(f"_{i}") for i, name in enumerate(priors)}
    if estimates:
        given = (recipe, variables, images, scale, mesh)
        _, found = estimate_importance_weighted(*given, num_samples=1, priors=estimates)
        others |= {name: {"elbo": bounds["elbo"]} for name, bounds in found.items()}
    return of(""), others


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
