"""The compiled steps of evaluation and generation: pure functions of a batch."""

import functools
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8

from svae_jax.devices import compiler
from svae_jax.model import SpatialVAE
from svae_jax.model import objective as objectives
from svae_jax.model import pixels as pixel_ops


def _apply(model: SpatialVAE, variables: PyTree, *args: Any, method: str = "__call__") -> Any:
    """`model.apply` in evaluation, without the other collections that Flax's types allow for."""
    return model.apply(variables, *args, method=method)


@functools.partial(compiler.jit, static_argnums=0)
def eval_step(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: UInt8[Array, "b h w c"],
    sigma: Float[Array, ""] | float,
) -> dict[str, Float[Array, " b"]]:
    """Evaluates a batch with one sample of z an image and a fixed σ.

    Each array is averaged over the held-out images and reported under its name; a new metric is one
    more line here.

    Returns:
        `[b]` by name, in nats an image: `reconstruction` (log p(x|z) of the density on [-1, 1]),
        `kl`, `elbo` (their difference: β = 1, no free bits), and `elbo_discretized` of the 8-bit
        image; and `squared_error`, summed over pixels and channels.
    """
    images = pixel_ops.to_float(pixels)
    means, params, _ = _apply(model, variables, key, images)
    kl = model.posterior.kl(params)
    reconstruction = objectives.gaussian_log_prob(images, means, sigma)
    discretized = objectives.discretized_gaussian_log_prob(images, means, sigma)
    return {
        "elbo": reconstruction - kl,
        "elbo_discretized": discretized - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "squared_error": objectives.squared_error(images, means),
    }


@functools.partial(compiler.jit, static_argnums=(0, 5, 6))
def importance_weighted_step(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: UInt8[Array, "b h w c"],
    sigma: Float[Array, ""] | float,
    num_samples: int,
    chunk_size: int,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Importance-weighted bounds in nats: of the continuous density, and of the 8-bit image."""
    images = pixel_ops.to_float(pixels)
    params = _apply(model, variables, images, method="encode")

    def log_likelihood(z: Float[Array, "b h w n"]) -> tuple:
        means = _apply(model, variables, z, method="decode")
        return (
            objectives.gaussian_log_prob(images, means, sigma),
            objectives.discretized_gaussian_log_prob(images, means, sigma),
        )

    density, discretized = objectives.log_importance_weights(
        key,
        model.posterior,
        params,
        log_likelihood,
        num_samples=num_samples,
        chunk_size=chunk_size,
    )
    bound = objectives.importance_weighted_bound
    return bound(density), bound(discretized)


@functools.partial(compiler.jit, static_argnums=(0, 3))
def generate(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, count: int
) -> Float[Array, "{count} h w c"]:
    """Draw images from the model: the means of the pixels for latents drawn from the prior."""
    return _apply(model, variables, model.sample_prior(key, count), method="decode")


@functools.partial(compiler.jit, static_argnums=0)
def decode(
    model: SpatialVAE, variables: PyTree, z: Float[Array, "b h w n"]
) -> Float[Array, "b _h _w c"]:
    """The images of latents: the means of their pixels."""
    return _apply(model, variables, z, method="decode")


@functools.partial(compiler.jit, static_argnums=0)
def reconstruct(
    model: SpatialVAE, variables: PyTree, key: PRNGKeyArray, pixels: UInt8[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Encode, draw one sample of each posterior, and decode."""
    return _apply(model, variables, key, pixel_ops.to_float(pixels)).means
