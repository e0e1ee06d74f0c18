"""Gaussian priors whose covariance is (one over the locations) ⊗ (one over the maps)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.latents import base
from svae_jax.latents.base import LatentGaussian, Params, Prior, Shapes


@dataclass(frozen=True)
class KroneckerNormal:
    """A Gaussian whose covariance is (one over the hw locations) ⊗ (one over the maps).

    With W = W_space ⊗ W_maps, over the row-major flattening of ``[h, w, n]``, the entries of
    u = W(z − M₀) are independent standard normal. Both factors are lower triangular with a positive
    diagonal: they are the inverse Cholesky factors of the two covariances, and

        log|W| = n·log|W_space| + hw·log|W_maps|.

    A prior of this form is a subclass with a `name`, which adds its arrays to `shapes` and defines
    the two factors.
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

    def space_whitening(self, params: Params) -> Float[Array, "hw hw"]:
        """W_space, lower triangular, over the locations in raster order."""
        raise NotImplementedError

    def maps_whitening(self, params: Params) -> Float[Array, "n n"]:
        """W_maps, lower triangular."""
        raise NotImplementedError

    def whiten(
        self, params: Params, z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch hw n"]:
        """U = W_space (Z − M₀) W_mapsᵀ, with Z as a matrix of locations × maps."""
        deviation = z - params["mean"]
        deviation = deviation.reshape(*z.shape[:-3], self.height * self.width, self.maps)
        space, maps = self.space_whitening(params), self.maps_whitening(params)
        return _einsum("ac,...cj,kj->...ak", space, deviation, maps)

    def roots(self, params: Params) -> tuple[Float[Array, "hw hw"], Float[Array, "n n"]]:
        """Lower triangular roots W⁻¹ of the covariances of the locations and of the maps."""
        space, maps = (
            solve_triangular(factor, jnp.eye(len(factor)), lower=True)
            for factor in (self.space_whitening(params), self.maps_whitening(params))
        )
        return space, maps

    def kl_per_map(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch n"]:
        """The terms of every map in KL(q ‖ p), in nats: ``[*batch, n]``; they sum to it.

        With U the whitened posterior mean, the term of map k is

            ½ [Σ_j (W_maps)²_kj tr(W_spaceᵀ W_space Σ_j) + Σ_a u²_ak − hw − log|Σ_k|]
            − log|W_space| − hw·log (W_maps)_kk.

        It is the divergence from p(z_k | z_1 … z_{k−1}), averaged over q: it is not negative, and
        depends on the order of the maps.
        """
        check_sizes(self, posterior)
        space, maps = self.space_whitening(params), self.maps_whitening(params)
        traces = posterior.weighted_trace(q_params, _einsum("ca,cb->ab", space, space))
        trace = _einsum("kj,...j->...k", maps**2, traces)
        squared_mean = jnp.sum(self.whiten(params, posterior.mean(q_params)) ** 2, axis=-2)
        log_det = posterior.covariance_model.log_det(q_params)
        locations = self.height * self.width
        log_whitening = jnp.sum(_log_diagonal(space)) + locations * _log_diagonal(maps)
        return 0.5 * (trace + squared_mean - locations - log_det) - log_whitening

    def kl_per_location(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch h w"]:
        """The terms of every location in KL(q ‖ p), in nats: ``[*batch, h, w]``.

        With U the whitened posterior mean and σ² the posterior's marginal variances, the term of
        location a is

            ½ Σ_k [(WΣWᵀ)_ak,ak + u²_ak − 1 − log σ²_ak] − n·log (W_space)_aa − log|W_maps|.

        Where the posterior's entries are independent, it is the divergence from p(z_a | the
        locations before it in raster order), averaged over q: it depends on that order, is not
        negative, and sums to the KL. For `mvn_full` and `lowrank_full` the sum is lower by the
        divergence of q from the product of its marginals, which belongs to no location, and a term
        may be negative.
        """
        check_sizes(self, posterior)
        space, maps = self.space_whitening(params), self.maps_whitening(params)
        variances = posterior.projected_variances(q_params, space)
        variances = _einsum("kj,...aj->...ak", maps**2, variances)
        mean = self.whiten(params, posterior.mean(q_params))
        log_variance = 2 * jnp.log(posterior.stddev(q_params)).reshape(mean.shape)
        log_whitening = self.maps * _log_diagonal(space) + jnp.sum(_log_diagonal(maps))
        nats = 0.5 * jnp.sum(variances + mean**2 - 1 - log_variance, axis=-1) - log_whitening
        return nats.reshape(*nats.shape[:-1], self.height, self.width)

    def log_prob(self, params: Params, z: Float[Array, "*batch h w n"]) -> Float[Array, "*batch"]:
        """log p(z) = log|W| − ½‖W(z − M₀)‖² − ½ hwn·log 2π in nats: ``[*batch]``."""
        check_shape(self, z)
        log_space = jnp.sum(_log_diagonal(self.space_whitening(params)))
        log_maps = jnp.sum(_log_diagonal(self.maps_whitening(params)))
        locations = self.height * self.width
        log_det = self.maps * log_space + locations * log_maps
        squared = jnp.sum(self.whiten(params, z) ** 2, axis=(-2, -1))
        return log_det - 0.5 * (squared + locations * self.maps * math.log(2 * math.pi))

    def sample(
        self, key: PRNGKeyArray, params: Params, batch: tuple[int, ...]
    ) -> Float[Array, "*batch h w n"]:
        """Draws M₀ + W⁻¹ε, ``[*batch, h, w, n]``, of JAX's default float."""
        noise = jax.random.normal(key, (*batch, self.height * self.width, self.maps))
        space, maps = self.roots(params)
        deviation = _einsum("ac,...cj,kj->...ak", space, noise, maps)
        return params["mean"] + deviation.reshape(*batch, self.height, self.width, self.maps)


def _log_diagonal(lower: Float[Array, "d d"]) -> Float[Array, " d"]:
    return jnp.log(jnp.diagonal(lower))


def _einsum(subscripts: str, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
    """Einsum at full precision: accelerators would round the factors of a float32 product."""
    return jnp.einsum(subscripts, *arrays, precision=lax.Precision.HIGHEST)


def check_sizes(prior: Prior, posterior: LatentGaussian) -> None:
    """Raises ValueError unless the posterior has the prior's sizes."""
    expected = (prior.height, prior.width, prior.maps)
    sizes = (posterior.height, posterior.width, posterior.maps)
    if sizes != expected:
        raise ValueError(
            f"posterior must have the prior's height, width and maps {expected}, got {sizes}"
        )


def check_shape(prior: Prior, z: Float[Array, "..."]) -> None:
    """Raises ValueError unless z ends in the prior's sizes."""
    expected = (prior.height, prior.width, prior.maps)
    if z.shape[-3:] != expected:
        raise ValueError(f"z must end in the prior's [h, w, n] = {expected}, got shape {z.shape}")
