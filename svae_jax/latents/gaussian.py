"""What learned Gaussian priors share: a mean, and a whitening of all entries."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64

from svae_jax.latents import base
from svae_jax.latents.base import LatentGaussian, Params, Shapes, Sizes


@dataclass(frozen=True)
class LearnedGaussian:
    """A Gaussian prior with a mean M₀ and a whitening W, both learned.

    Over the row-major flattening of ``[h, w, n]``, the entries of u = W(z − M₀) are independent
    standard normal. W is lower triangular with a positive diagonal: it is the inverse Cholesky
    factor of the covariance.

    A prior of this form is a subclass with a `name`, which adds its arrays to `shapes` and defines
    the methods that raise NotImplementedError here, and `sample`.
    """

    name: ClassVar[str]
    height: int
    width: int
    maps: int

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of the learned arrays: here the mean M₀ ``[h, w, n]``."""
        return {"mean": (self.height, self.width, self.maps)}

    @property
    def num_params(self) -> int:
        """The number of learned parameters."""
        return base.count(self.shapes)

    def initial(self) -> Params:
        """Zeros: N(0, I)."""
        return {name: jnp.zeros(shape) for name, shape in self.shapes.items()}

    def mean(self, params: Params) -> Float[Array, "h w n"]:
        """M₀."""
        return params["mean"]

    def whiten(
        self, params: Params, z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch hw n"]:
        """U = W(z − M₀), as locations × maps."""
        raise NotImplementedError

    def log_det_whitening(self, params: Params) -> Float[Array, ""]:
        """log|W|."""
        raise NotImplementedError

    def covariance_factors(
        self, params: Params
    ) -> tuple[Float64[np.ndarray, "a a"], Float64[np.ndarray, "b b"]]:
        """Two matrices whose Kronecker product is the covariance, ab = hwn, in float64."""
        raise NotImplementedError

    def log_prob(self, params: Params, z: Float[Array, "*batch h w n"]) -> Float[Array, "*batch"]:
        """log p(z) = log|W| − ½‖W(z − M₀)‖² − ½ hwn·log 2π in nats: ``[*batch]``."""
        check_shape(self, z)
        squared = jnp.sum(self.whiten(params, z) ** 2, axis=(-2, -1))
        size = self.height * self.width * self.maps
        return self.log_det_whitening(params) - 0.5 * (squared + size * math.log(2 * math.pi))


def einsum(subscripts: str, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
    """Einsum at full precision: accelerators would round the factors of a float32 product."""
    return jnp.einsum(subscripts, *arrays, precision=lax.Precision.HIGHEST)


def log_diagonal(lower: Float[Array, "d d"]) -> Float[Array, " d"]:
    """The logarithms of a matrix's diagonal."""
    return jnp.log(jnp.diagonal(lower))


def triangle_size(size: int) -> int:
    """The number of entries of a lower triangular matrix of ``size``."""
    return size * (size + 1) // 2


def lower_triangular(
    flat: Float[Array, " entries"], size: int, *, unit_determinant: bool = False
) -> Float[Array, "d d"]:
    """The lower triangular matrix with these entries, row by row.

    Args:
        flat: ``[size(size+1)/2]``; the entries on the diagonal are its logarithms.
        size: the number of rows d.
        unit_determinant: whether to subtract the mean of the log-diagonal.
    """
    lower = jnp.zeros((size, size), flat.dtype).at[np.tril_indices(size)].set(flat)
    log_diagonal = jnp.diagonal(lower)
    if unit_determinant:
        log_diagonal -= jnp.mean(log_diagonal)
    return jnp.tril(lower, -1) + jnp.diag(jnp.exp(log_diagonal))


def triangle(lower: Float64[np.ndarray, "d d"]) -> Float[Array, " entries"]:
    """The inverse of `lower_triangular`, in float32."""
    logs = np.tril(lower, -1) + np.diag(np.log(np.diag(lower)))
    return jnp.asarray(logs[np.tril_indices(len(lower))], jnp.float32)


def check_sizes(prior: Sizes, posterior: LatentGaussian) -> None:
    """Raises ValueError unless the posterior has the prior's sizes."""
    expected = (prior.height, prior.width, prior.maps)
    sizes = (posterior.height, posterior.width, posterior.maps)
    if sizes != expected:
        raise ValueError(
            f"posterior must have the prior's height, width and maps {expected}, got {sizes}"
        )


def check_shape(prior: Sizes, z: Float[Array, "..."]) -> None:
    """Raises ValueError unless z ends in the prior's sizes."""
    expected = (prior.height, prior.width, prior.maps)
    if z.shape[-3:] != expected:
        raise ValueError(f"z must end in the prior's [h, w, n] = {expected}, got shape {z.shape}")
