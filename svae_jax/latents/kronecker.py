"""Gaussian priors whose covariance is (one over the locations) ⊗ (one over the maps)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from svae_jax.latents.base import LatentGaussian, Params
from svae_jax.latents.gaussian import LearnedGaussian, check_sizes, einsum, log_diagonal


@dataclass(frozen=True)
class KroneckerNormal(LearnedGaussian):
    """A Gaussian whose covariance is (one over the hw locations) ⊗ (one over the maps).

    With W = W_space ⊗ W_maps, over the row-major flattening of ``[h, w, n]``, the entries of
    u = W(z − M₀) are independent standard normal. Both factors are lower triangular with a positive
    diagonal: they are the inverse Cholesky factors of the two covariances, and

        log|W| = n·log|W_space| + hw·log|W_maps|.

    A prior of this form is a subclass with a `name`, which adds its arrays to `shapes` and defines
    the two factors.
    """

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
        return einsum("ac,...cj,kj->...ak", space, deviation, maps)

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
        traces = posterior.weighted_trace(q_params, einsum("ca,cb->ab", space, space))
        trace = einsum("kj,...j->...k", maps**2, traces)
        squared_mean = jnp.sum(self.whiten(params, posterior.mean(q_params)) ** 2, axis=-2)
        log_det = posterior.covariance_model.log_det(q_params)
        locations = self.height * self.width
        log_whitening = jnp.sum(log_diagonal(space)) + locations * log_diagonal(maps)
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
        variances = einsum("kj,...aj->...ak", maps**2, variances)
        mean = self.whiten(params, posterior.mean(q_params))
        log_variance = 2 * jnp.log(posterior.stddev(q_params)).reshape(mean.shape)
        log_whitening = self.maps * log_diagonal(space) + jnp.sum(log_diagonal(maps))
        nats = 0.5 * jnp.sum(variances + mean**2 - 1 - log_variance, axis=-1) - log_whitening
        return nats.reshape(*nats.shape[:-1], self.height, self.width)

    def log_det_whitening(self, params: Params) -> Float[Array, ""]:
        """log|W| = n·log|W_space| + hw·log|W_maps|."""
        log_space = jnp.sum(log_diagonal(self.space_whitening(params)))
        log_maps = jnp.sum(log_diagonal(self.maps_whitening(params)))
        return self.maps * log_space + self.height * self.width * log_maps

    def covariance_factors(
        self, params: Params
    ) -> tuple[Float64[np.ndarray, "hw hw"], Float64[np.ndarray, "n n"]]:
        """The covariances of the locations and of the maps, in float64."""
        space, maps = (np.asarray(root, np.float64) for root in self._roots(params))
        return space @ space.T, maps @ maps.T

    def sample(
        self, key: PRNGKeyArray, params: Params, batch: tuple[int, ...]
    ) -> Float[Array, "*batch h w n"]:
        """Draws M₀ + W⁻¹ε, ``[*batch, h, w, n]``, of JAX's default float."""
        noise = jax.random.normal(key, (*batch, self.height * self.width, self.maps))
        space, maps = self._roots(params)
        deviation = einsum("ac,...cj,kj->...ak", space, noise, maps)
        return params["mean"] + deviation.reshape(*batch, self.height, self.width, self.maps)

    def _roots(self, params: Params) -> tuple[Float[Array, "hw hw"], Float[Array, "n n"]]:
        """Lower triangular roots W⁻¹ of the covariances of the locations and of the maps."""
        space, maps = (
            solve_triangular(factor, jnp.eye(len(factor)), lower=True)
            for factor in (self.space_whitening(params), self.maps_whitening(params))
        )
        return space, maps
