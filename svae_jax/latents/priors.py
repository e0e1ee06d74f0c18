"""The prior over latent maps: standard normal, or a Gaussian that is learned with the model.

| name             | p(z)                                     | parameters                         |
|------------------|------------------------------------------|------------------------------------|
| `standard`       | N(0, I), as in the paper                 | none                               |
| `tensor_normal`  | N(M₀, R⊗S⊗T) over rows, columns and maps | hwn + (h² + h + w² + w + n² + n)/2 |
| `matrix_normal`  | N(M₀, C⊗T) over hw locations and maps    | hwn + (h²w² + hw + n² + n)/2       |
| `autoregressive` | each location given 4 before it          | hwn + 4n² + (n² + n)/2             |

A prior holds sizes and no arrays; the learned arrays are given to each method as `params`, without
batch axes. With all of them at zero, every prior is N(0, I).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from svae_jax.latents import base
from svae_jax.latents.autoregressive import Autoregressive
from svae_jax.latents.base import LatentGaussian, Params, Prior, Shapes
from svae_jax.latents.gaussian import (
    check_shape,
    check_sizes,
    lower_triangular,
    triangle,
    triangle_size,
)
from svae_jax.latents.kronecker import KroneckerNormal


@dataclass(frozen=True)
class StandardNormal:
    """N(0, I): independent entries of mean 0 and variance 1, and nothing to learn."""

    name: ClassVar[str] = "standard"
    height: int
    width: int
    maps: int

    @property
    def shapes(self) -> Shapes:
        """No arrays."""
        return {}

    @property
    def num_params(self) -> int:
        """Zero."""
        return 0

    def initial(self) -> Params:
        """No arrays."""
        return {}

    def mean(self, params: Params) -> Float[Array, "h w n"]:
        """Zeros."""
        del params
        return jnp.zeros((self.height, self.width, self.maps))

    def kl_per_map(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch n"]:
        """½ [tr Σ + ‖M‖² − hw − log|Σ|] of every map, in nats: ``[*batch, n]``."""
        del params
        check_sizes(self, posterior)
        trace = posterior.covariance_model.trace(q_params)
        log_det = posterior.covariance_model.log_det(q_params)
        squared_mean = jnp.sum(posterior.mean(q_params) ** 2, axis=(-3, -2))
        return 0.5 * (trace + squared_mean - self.height * self.width - log_det)

    def kl_per_location(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch h w"]:
        """The sum of `marginal_kl` over the maps, in nats: ``[*batch, h, w]``."""
        del params
        return jnp.sum(self.marginal_kl(posterior, q_params), axis=-1)

    def marginal_kl(
        self, posterior: LatentGaussian, q_params: Params
    ) -> Float[Array, "*batch h w n"]:
        """½ (σ²_ij + m²_ij − 1 − log σ²_ij) of every entry, in nats: ``[*batch, h, w, n]``."""
        check_sizes(self, posterior)
        stddev = posterior.stddev(q_params)
        return 0.5 * (stddev**2 + posterior.mean(q_params) ** 2 - 1) - jnp.log(stddev)

    def log_prob(self, params: Params, z: Float[Array, "*batch h w n"]) -> Float[Array, "*batch"]:
        """log N(z; 0, I) in nats: ``[*batch]``."""
        del params
        check_shape(self, z)
        return -0.5 * jnp.sum(z**2, axis=(-3, -2, -1)) - 0.5 * math.log(2 * math.pi) * math.prod(
            z.shape[-3:]
        )

    def sample(
        self, key: PRNGKeyArray, params: Params, batch: tuple[int, ...]
    ) -> Float[Array, "*batch h w n"]:
        """White noise ``[*batch, h, w, n]``, of JAX's default float."""
        del params
        return jax.random.normal(key, (*batch, self.height, self.width, self.maps))


@dataclass(frozen=True)
class TensorNormal(KroneckerNormal):
    """N(M₀, R⊗S⊗T): W_space = W_rows ⊗ W_cols.

    The factors are the flat triangles ``rows [h(h+1)/2]``, ``cols [w(w+1)/2]`` and
    ``maps [n(n+1)/2]``, row by row, with logarithms on the diagonals. Only their product matters,
    so |W_rows| = |W_cols| = 1, and W_maps holds the scale.
    """

    name: ClassVar[str] = "tensor_normal"

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of the learned arrays."""
        return super().shapes | {
            "rows": (triangle_size(self.height),),
            "cols": (triangle_size(self.width),),
            "maps": (triangle_size(self.maps),),
        }

    def space_whitening(self, params: Params) -> Float[Array, "hw hw"]:
        """W_rows ⊗ W_cols."""
        rows = lower_triangular(params["rows"], self.height, unit_determinant=True)
        cols = lower_triangular(params["cols"], self.width, unit_determinant=True)
        return jnp.kron(rows, cols)

    def maps_whitening(self, params: Params) -> Float[Array, "n n"]:
        """W_maps."""
        return lower_triangular(params["maps"], self.maps)

    def of_moments(
        self, mean: Float64[np.ndarray, "h w n"], covariance: Float64[np.ndarray, "d d"]
    ) -> Params:
        """The most likely parameters for latents of these moments (see `MatrixNormal`)."""
        factors = _alternate(covariance, (self.height, self.width, self.maps))
        rows, cols, maps = _whitenings(factors)
        return _params(mean, rows=rows, cols=cols, maps=maps)


@dataclass(frozen=True)
class MatrixNormal(KroneckerNormal):
    """N(M₀, C⊗T): one factor over all hw locations, which need not be a Kronecker product.

    The factors are the flat triangles ``space [hw(hw+1)/2]`` and ``maps [n(n+1)/2]``, row by row,
    with logarithms on the diagonals. Only their product matters, so |W_space| = 1.
    """

    name: ClassVar[str] = "matrix_normal"

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of the learned arrays."""
        return super().shapes | {
            "space": (triangle_size(self.height * self.width),),
            "maps": (triangle_size(self.maps),),
        }

    def space_whitening(self, params: Params) -> Float[Array, "hw hw"]:
        """W_space."""
        locations = self.height * self.width
        return lower_triangular(params["space"], locations, unit_determinant=True)

    def maps_whitening(self, params: Params) -> Float[Array, "n n"]:
        """W_maps."""
        return lower_triangular(params["maps"], self.maps)

    def of_moments(
        self, mean: Float64[np.ndarray, "h w n"], covariance: Float64[np.ndarray, "d d"]
    ) -> Params:
        """The parameters of highest likelihood for latents of these moments.

        Given the other factors, each has a closed form; they are computed in turn (Dutilleul 1999).

        Args:
            mean: E[z].
            covariance: Cov[z], ``[hwn, hwn]``, positive definite, of z flattened row by row.
        """
        factors = _alternate(covariance, (self.height * self.width, self.maps))
        space, maps = _whitenings(factors)
        return _params(mean, space=space, maps=maps)


# name -> how it is built; a new prior is one more class in the tuple
_TABLE: dict[str, Callable[..., Prior]] = {
    prior.name: prior for prior in (StandardNormal, TensorNormal, MatrixNormal, Autoregressive)
}


def prior_names() -> tuple[str, ...]:
    """The names that `make_prior` takes."""
    return tuple(_TABLE)


def make_prior(name: str, *, height: int, width: int, maps: int) -> Prior:
    """The prior of that name over `maps` maps of `height` × `width`.

    Args:
        name: one of `prior_names()`.
        height: rows h of a map.
        width: columns w of a map.
        maps: the number of maps N.

    Raises:
        ValueError: an unknown name, or a size that is no positive integer.
    """
    if name not in _TABLE:
        raise ValueError(f"name must be one of {', '.join(prior_names())}, got name={name!r}")
    base.check_positive(height=height, width=width, maps=maps)
    return _TABLE[name](height, width, maps)


def _alternate(
    covariance: Float64[np.ndarray, "d d"], sizes: tuple[int, ...], rounds: int = 20
) -> list[Float64[np.ndarray, "_m _m"]]:
    """The Kronecker factors of highest likelihood, by the flip-flop algorithm (Dutilleul 1999)."""
    joint = covariance.reshape(*sizes, *sizes)
    factors = [np.eye(size) for size in sizes]
    axes = range(len(sizes))
    for _ in range(rounds):
        for i in axes:
            # The trace over all other axes, each weighted by the inverse of its factor.
            operands: list = [joint, [*axes, *(len(sizes) + axis for axis in axes)]]
            for j in axes:
                if j != i:
                    operands += [np.linalg.inv(factors[j]), [j, len(sizes) + j]]
            traced = np.einsum(*operands, [i, len(sizes) + i], optimize=True)
            factors[i] = traced * sizes[i] / math.prod(sizes)
    return factors


def _whitenings(
    factors: list[Float64[np.ndarray, "_m _m"]],
) -> list[Float64[np.ndarray, "_m _m"]]:
    """Inverse Cholesky factors, all but the last of determinant one; the last has the scale."""
    lowers = [np.linalg.inv(np.linalg.cholesky(factor)) for factor in factors]
    for i, lower in enumerate(lowers[:-1]):
        scale = np.exp(np.mean(np.log(np.diag(lower))))
        lowers[i], lowers[-1] = lower / scale, lowers[-1] * scale
    return lowers


def _params(mean: Float64[np.ndarray, "h w n"], **lowers: Float64[np.ndarray, "_m _m"]) -> Params:
    """A mean and lower triangles as parameters: flat, with logarithms on the diagonals."""
    params = {"mean": jnp.asarray(mean, jnp.float32)}
    return params | {name: triangle(lower) for name, lower in lowers.items()}


def sample_prior(
    key: PRNGKeyArray, batch: tuple[int, ...], *, height: int, width: int, maps: int
) -> Float[Array, "*batch h w n"]:
    """Draws latent maps from the prior N(0, I).

    Returns:
        ``[*batch, height, width, maps]``, of JAX's default float.

    Raises:
        ValueError: a size that is no positive integer.
    """
    prior = make_prior("standard", height=height, width=width, maps=maps)
    return prior.sample(key, {}, batch)
