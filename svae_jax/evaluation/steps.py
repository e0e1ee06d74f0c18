"""The compiled steps of evaluation and generation: pure functions of a batch."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from svae_jax.devices import compiler
from svae_jax.likelihoods import Likelihood
from svae_jax.model import SpatialVAE
from svae_jax.model import objective as objectives


def _apply(model: SpatialVAE, variables: PyTree, *args: Any, method: str = "__call__") -> Any:
    """`model.apply` in evaluation, without the other collections that Flax's types allow for."""
    return model.apply(variables, *args, method=method)


def _likelihood(model: SpatialVAE) -> Likelihood:
    assert model.likelihood is not None  # the configuration sets it
    return model.likelihood


@functools.partial(compiler.jit, static_argnums=0)
def eval_step(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: Num[Array, "b h w c"],
    scale: Float[Array, "*s"] | float,
) -> dict[str, Float[Array, " b"]]:
    """Evaluates a batch with one sample of z an image and a fixed scale σ.

    Each array is averaged over the held-out images and reported under its name; a new metric is one
    more line here.

    Returns:
        `[b]` by name, in nats an image: `reconstruction` (log p(x|z), of the density on [-1, 1] or
        as the likelihood says), `kl`, `elbo` (their difference: β = 1, no free bits), and for
        images of integers `elbo_discretized`, with the masses of these integers.
    """
    likelihood, scale = _likelihood(model), jnp.asarray(scale)
    images = likelihood.pixels.to_float(pixels)
    outputs, _, _, kl_per_map = _apply(model, variables, key, images)
    kl = jnp.sum(kl_per_map, axis=-1)
    reconstruction = likelihood.log_prob(scale, images, outputs)
    values = {
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
    }
    if likelihood.pixels.is_integer:
        values["elbo_discretized"] = likelihood.log_mass(scale, images, outputs) - kl
    return values


@functools.partial(compiler.jit, static_argnums=0)
def error_step(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, pixels: Num[Array, "b h w c"]
) -> Float[Array, "b *k"]:
    """The statistic of the optimal σ of each image, with one sample of z (`Likelihood.error`)."""
    likelihood = _likelihood(model)
    images = likelihood.pixels.to_float(pixels)
    return likelihood.error(images, _apply(model, variables, key, images).outputs)


@functools.partial(compiler.jit, static_argnums=0)
def reconstruction_step(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, pixels: Num[Array, "b h w c"]
) -> dict[str, Float[Array, "b ..."]]:
    """How well a batch is reconstructed from one sample of z an image, and what its latents carry.

    Reconstructions are clipped to [-1, 1], as pictures are, and not rounded.

    Returns:
        `mse` `[b]`, the mean squared error of a pixel's channel in [-1, 1]; `psnr` `[b]` in
        decibels, 10 log10(2² / mse); `ssim` `[b]` (Wang et al. 2004: Gaussian windows of 11×11
        pixels with σ = 1.5, or as many as fit into the image; of each channel, averaged);
        `posterior_mean` `[b, h, w, n]`, `kl_per_map` `[b, n]` and `kl_per_location` `[b, h, w]`.
    """
    import dm_pix  # here, so that training needs no package but JAX and Flax

    likelihood = _likelihood(model)
    images = likelihood.pixels.to_float(pixels)
    outputs, params, _, kl_per_map = _apply(model, variables, key, images)
    means = jnp.clip(likelihood.mean(outputs).astype(jnp.float32), -1.0, 1.0)
    mse = jnp.mean(jnp.square(images - means), axis=(1, 2, 3))
    side = min(images.shape[1:3])
    ssim = dm_pix.ssim(
        # Levels from 0: SSIM is not the same for shifted images.
        (images + 1) / 2, (means + 1) / 2, filter_size=min(11, side - (side + 1) % 2)
    )  # fmt: skip
    return {
        "mse": mse,
        "psnr": 10 * jnp.log10(4 / mse),
        "ssim": ssim,
        "posterior_mean": model.posterior.mean(params),
        "kl_per_map": kl_per_map,
        "kl_per_location": _apply(model, variables, params, method="kl_per_location"),
    }


@functools.partial(compiler.jit, static_argnums=(0, 5, 6))
def importance_weighted_step(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: Num[Array, "b h w c"],
    scale: Float[Array, "*s"] | float,
    num_samples: int,
    chunk_size: int,
) -> dict[str, Float[Array, " b"]]:
    """Importance-weighted bounds in nats.

    Returns:
        `density` `[b]`, the bound on what `Likelihood.log_prob` is of; and for images of integers
        `discretized` `[b]`, that on their probability.
    """
    likelihood, scale = _likelihood(model), jnp.asarray(scale)
    images = likelihood.pixels.to_float(pixels)
    params = _apply(model, variables, images, method="encode")

    def log_likelihood(z: Float[Array, "b h w n"]) -> dict[str, Array]:
        outputs = _apply(model, variables, z, method="decode")
        values = {"density": likelihood.log_prob(scale, images, outputs)}
        if likelihood.pixels.is_integer:
            values["discretized"] = likelihood.log_mass(scale, images, outputs)
        return values

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
    return {name: bound(weights) for name, weights in log_weights.items()}


@functools.partial(compiler.jit, static_argnums=(0, 3))
def generate(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, count: int
) -> Float[Array, "{count} h w c"]:
    """Draws images from the model: E[x|z], in [-1, 1], for latents drawn from the prior."""
    return _apply(model, variables, model.sample_prior(key, count, variables), method="images")


@functools.partial(compiler.jit, static_argnums=0)
def decode(
    model: SpatialVAE, variables: PyTree, z: Float[Array, "b h w n"]
) -> Float[Array, "b _h _w c"]:
    """Decodes latents to images E[x|z] in [-1, 1]."""
    return _apply(model, variables, z, method="images")


@functools.partial(compiler.jit, static_argnums=0)
def reconstruct(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, pixels: Num[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Encodes, draws one sample of each posterior, and decodes to E[x|z] in [-1, 1]."""
    likelihood = _likelihood(model)
    outputs = _apply(model, variables, key, likelihood.pixels.to_float(pixels)).outputs
    return likelihood.mean(outputs)
