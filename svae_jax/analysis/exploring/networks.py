"""Encoding and decoding of any number of rows, for exploring."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from svae_jax.devices import batches, compiler, runtime
from svae_jax.evaluation import steps
from svae_jax.latents import Params
from svae_jax.model import SpatialVAE

_SIZE = 32  # rows at a time


class Posteriors(NamedTuple):
    """The posteriors of a batch of images.

    Attributes:
        params: their arrays by name.
        mean: `[b, h, w, n]`.
        stddev: marginal standard deviations, `[b, h, w, n]`.
        kl: nats, `[b]`.
        kl_per_location: nats of each location, `[b, h, w]`.
    """

    params: Params
    mean: Float[np.ndarray, "b h w n"]
    stddev: Float[np.ndarray, "b h w n"]
    kl: Float[np.ndarray, " b"]
    kl_per_location: Float[np.ndarray, "b h w"]


@runtime.own_numerics()
def encode(
    model: SpatialVAE, variables: PyTree, images: Float[np.ndarray, "b h w c"]
) -> Posteriors:
    """Encodes any number of images in [-1, 1]."""
    found = batches.gather(lambda batch: _encode(model, variables, batch.rows), images, _SIZE)
    return Posteriors(**found)


@runtime.own_numerics()
def decode(
    model: SpatialVAE, variables: PyTree, z: Float[np.ndarray, "b h w n"]
) -> Float[np.ndarray, "b _h _w c"]:
    """Decodes any number of latents to images in units of [-1, 1], not clipped."""
    return batches.gather(lambda batch: steps.decode(model, variables, batch.rows), z, _SIZE)


@functools.partial(compiler.jit, static_argnums=0)
def _encode(
    model: SpatialVAE, variables: PyTree, images: Float[Array, "b h w c"]
) -> dict[str, PyTree]:
    params: Any = model.apply(variables, images, method="encode")
    kl_per_map: Any = model.apply(variables, params, method="kl_per_map")
    posterior = model.posterior
    return {
        "params": params,
        "mean": posterior.mean(params),
        "stddev": posterior.stddev(params),
        "kl": jnp.sum(kl_per_map, axis=-1),
        "kl_per_location": model.apply(variables, params, method="kl_per_location"),
    }
