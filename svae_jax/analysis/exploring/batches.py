"""The compiled functions of exploring, and how any number of rows goes through them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from svae_jax.devices import compiler, runtime
from svae_jax.evaluation import steps
from svae_jax.latents import Params
from svae_jax.model import SpatialVAE

SIZE = 32  # rows at a time


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
    return Posteriors(**over(functools.partial(_encode, model, variables), images))


@runtime.own_numerics()
def decode(
    model: SpatialVAE, variables: PyTree, z: Float[np.ndarray, "b h w n"]
) -> Float[np.ndarray, "b _h _w c"]:
    """Decodes any number of latents to images in [-1, 1]."""
    return over(functools.partial(steps.decode, model, variables), z)


def over(function: Callable[[Any], PyTree], rows: Float[np.ndarray, "n ..."]) -> Any:
    """Applies a function of `SIZE` rows to any number of them, on the host.

    The last batch is filled up with copies of its last row, so that nothing is compiled anew.
    """
    parts = []
    for begin in range(0, len(rows), SIZE):
        index = np.minimum(np.arange(begin, begin + SIZE), len(rows) - 1)
        result = jax.device_get(function(jnp.asarray(rows[index])))
        parts.append(jax.tree.map(lambda leaf, begin=begin: leaf[: len(rows) - begin], result))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


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
