"""The compiled steps of evaluation and generation: pure functions of a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from svae_jax import model as models
from svae_jax.devices import compiler
from svae_jax.evaluation import per_image
from svae_jax.latents import Params
from svae_jax.likelihoods import Likelihood
from svae_jax.model import SpatialVAE
from svae_jax.model import objective as objectives


def _apply(model: SpatialVAE, variables: PyTree, *args: Any, method: str = "__call__") -> Any:
    """`model.apply` in evaluation, without the other collections that Flax's types allow for."""
    return model.apply(variables, *args, method=method)


def _likelihood(model: SpatialVAE) -> Likelihood:
    assert model.likelihood is not None  # the configuration sets it
    return model.likelihood


@functools.partial(compiler.jit, static_argnums=(0, 5, 6))
def eval_step(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: Num[Array, "b h w c"],
    scale: Float[Array, "*s"] | float,
    names: tuple[str, ...],
    with_latents: bool = False,
) -> dict[str, Float[Array, "b ..."]]:
    """Evaluates a batch with one sample of z an image and a fixed scale σ.

    Args:
        model: the networks, the posterior and the likelihood.
        variables: the evaluated variables.
        key: of the samples.
        pixels: in the units of the data.
        scale: σ.
        names: rows of `per_image.METRICS`.
        with_latents: whether to return what the latents carry, too.

    Returns:
        `[b]` by name; with latents also `posterior_mean` `[b, h, w, n]`, `kl_per_map` `[b, n]` and
        `kl_per_location` `[b, h, w]`.
    """
    likelihood = _likelihood(model)
    images = likelihood.pixels.to_float(pixels)
    outputs, params, _, kl_per_map = _apply(model, variables, key, images)
    kl = jnp.sum(kl_per_map, axis=-1)
    batch = per_image.Decoded(likelihood, jnp.asarray(scale), images, outputs, kl)
    values = {name: per_image.METRICS[name].function(batch) for name in names}
    if with_latents:
        values["posterior_mean"] = model.posterior.mean(params)
        values["kl_per_map"] = kl_per_map
        values["kl_per_location"] = _apply(model, variables, params, method="kl_per_location")
    return values


@functools.partial(compiler.jit, static_argnums=0)
def error_step(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, pixels: Num[Array, "b h w c"]
) -> Float[Array, "b *k"]:
    """The statistic of the optimal σ of each image, with one sample of z (`Likelihood.error`)."""
    likelihood = _likelihood(model)
    images = likelihood.pixels.to_float(pixels)
    return likelihood.error(images, _apply(model, variables, key, images).outputs)


LogPrior = Callable[[PyTree, Float[Array, "b h w n"]], Float[Array, " b"]]
"""Arrays and z -> log p(z) in nats; hashable."""


@functools.partial(compiler.jit, static_argnums=(0, 5, 6, 7))
def importance_weighted_step(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: Num[Array, "b h w c"],
    scale: Float[Array, "*s"] | float,
    num_samples: int,
    chunk_size: int,
    log_priors: tuple[LogPrior, ...] = (),
    prior_arrays: tuple[PyTree, ...] = (),
) -> dict[str, Float[Array, " b"]]:
    """Importance-weighted bounds in nats, under the model's prior and others in its place.

    Args:
        model: the networks, the posterior and the likelihood.
        variables: the evaluated variables.
        key: of the samples, which are the same for all priors.
        pixels: in the units of the data.
        scale: σ.
        num_samples: K.
        chunk_size: samples of each image that are decoded at a time.
        log_priors: densities that take the prior's place.
        prior_arrays: their arrays.

    Returns:
        `density` `[b]`, the bound on what `Likelihood.log_prob` is of; for images of integers
        `discretized` `[b]`, that on their probability; and for each of `log_priors` both, and
        `elbo`, of K samples, as `elbo_0`, `density_0`, `discretized_0`, ….
    """
    likelihood, scale = _likelihood(model), jnp.asarray(scale)
    images = likelihood.pixels.to_float(pixels)
    params = _apply(model, variables, images, method="encode")

    def log_likelihood(z: Float[Array, "b h w n"]) -> dict[str, Array]:
        outputs = _apply(model, variables, z, method="decode")
        values = {"density": likelihood.log_prob(scale, images, outputs)}
        if likelihood.pixels.is_integer:
            values["discretized"] = likelihood.log_mass(scale, images, outputs)
        of_model = _apply(model, variables, z, method="log_prior")
        pairs = enumerate(zip(log_priors, prior_arrays, strict=True))
        gains = [(i, log_prior(arrays, z) - of_model) for i, (log_prior, arrays) in pairs]
        return values | {f"{k}_{i}": v + gain for i, gain in gains for k, v in values.items()}

    log_weights = objectives.log_importance_weights(
        key,
        model.posterior,
        params,
        log_likelihood,
        functools.partial(_apply, model, variables, method="log_prior"),
        num_samples=num_samples,
        chunk_size=chunk_size,
    )
    bound = objectives.importance_weighted_bound
    bounds = {name: bound(weights) for name, weights in log_weights.items()}
    means = {f"elbo_{i}": log_weights[f"density_{i}"].mean(axis=0) for i in range(len(log_priors))}
    return bounds | means


@functools.partial(compiler.jit, static_argnums=(0, 3))
def generate(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, count: int
) -> Float[Array, "{count} h w c"]:
    """Draws latents from the prior and decodes them to E[x|z], in units of [-1, 1], not clipped."""
    return _apply(model, variables, model.sample_prior(key, count, variables), method="images")


@functools.partial(compiler.jit, static_argnums=0)
def encode(model: SpatialVAE, variables: PyTree, pixels: Num[Array, "b h w c"]) -> Params:
    """Encodes images in the units of the data to the arrays of their posteriors."""
    return models.encode(model, variables, pixels)


@functools.partial(compiler.jit, static_argnums=0)
def decode(
    model: SpatialVAE, variables: PyTree, z: Float[Array, "b h w n"]
) -> Float[Array, "b _h _w c"]:
    """Decodes latents to images E[x|z] in units of [-1, 1], not clipped."""
    return _apply(model, variables, z, method="images")


@functools.partial(compiler.jit, static_argnums=0)
def reconstruct(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, pixels: Num[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Encodes, draws one sample of each posterior, and decodes as `decode` does."""
    likelihood = _likelihood(model)
    outputs = _apply(model, variables, key, likelihood.pixels.to_float(pixels)).outputs
    return likelihood.mean(outputs)
