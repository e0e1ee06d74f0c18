"""A linear autoregressive Gaussian prior: each location given four preceding neighbours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Float64, PRNGKeyArray

from svae_jax.latents.base import LatentGaussian, Params, Shapes
from svae_jax.latents.gaussian import (
    LearnedGaussian,
    check_sizes,
    einsum,
    log_diagonal,
    lower_triangular,
    triangle,
    triangle_size,
)

# The neighbours of a location that come before it in raster order, as (rows, columns) from it.
NEIGHBOURS = ((0, -1), (-1, -1), (-1, 0), (-1, 1))
_SHIFTS = ((0, 0), *NEIGHBOURS)
_COUNT = len(_SHIFTS)


@dataclass(frozen=True)
class Autoregressive(LearnedGaussian):
    """An autoregression over the locations in raster order, with the same weights everywhere.

    With the deviations d = z − M₀, of which those beyond the border are zero,

        u_a = V d_a − Σ_b B_bᵀ d_{a+b} ~ N(0, I)

    for the four neighbours b before a location (left, upper left, above, upper right). So z_a given
    the locations before it is N(M₀_a + V⁻¹ Σ_b B_bᵀ d_{a+b}, (VᵀV)⁻¹), and log|W| = hw·log|V|. All
    maps depend on all maps; the number of weights does not grow with the number of locations.

    The arrays are ``mean [h, w, n]``, ``neighbours [4, n, n]``, which holds B, and ``maps
    [n(n+1)/2]``, the triangle of V row by row, with logarithms on the diagonal.
    """

    name: ClassVar[str] = "autoregressive"

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of the learned arrays."""
        return super().shapes | {
            "neighbours": (len(NEIGHBOURS), self.maps, self.maps),
            "maps": (triangle_size(self.maps),),
        }

    def whiten(
        self, params: Params, z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch hw n"]:
        """u of each location."""
        deviation = z - params["mean"]
        own = einsum("...j,kj->...k", deviation, self._own(params))
        before = jnp.concatenate(_neighbours(deviation), axis=-1)
        weights = params["neighbours"].reshape(-1, self.maps)
        white = own - einsum("...j,jk->...k", before, weights)
        return white.reshape(*z.shape[:-3], self.height * self.width, self.maps)

    def log_det_whitening(self, params: Params) -> Float[Array, ""]:
        """log|W| = hw·log|V|."""
        return self.height * self.width * jnp.sum(log_diagonal(self._own(params)))

    def covariance_factors(
        self, params: Params
    ) -> tuple[Float64[np.ndarray, "d d"], Float64[np.ndarray, "1 1"]]:
        """The covariance of all d = hwn entries in float64, and 1."""
        size = self.height * self.width * self.maps
        units = jnp.eye(size).reshape(size, self.height, self.width, self.maps)
        centred = params | {"mean": jnp.zeros_like(params["mean"])}
        whitening = np.asarray(self.whiten(centred, units), np.float64).reshape(size, size).T
        root = np.linalg.inv(whitening)
        return root @ root.T, np.ones((1, 1))

    def kl_per_map(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch n"]:
        """The terms of every map in KL(q ‖ p), in nats: ``[*batch, n]``; they sum to it.

        With u the whitened posterior mean, the term of map k is

            ½ [Σ_a (WΣWᵀ)_ak,ak + Σ_a u²_ak − hw − log|Σ_k|] − hw·log V_kk.

        It is the divergence from p(z_k | z_1 … z_{k−1} and the locations before), averaged over q:
        it depends on the order of the maps and of the locations.
        """
        check_sizes(self, posterior)
        kernels = self._kernels(params)
        # The sum over locations a of each map's covariances between a + b and a + c.
        sums = {
            (b, c): posterior.weighted_trace(q_params, self.pair_weights(b, c))
            for b in range(len(kernels))
            for c in range(b + 1)
        }
        trace = sum(
            (1 if b == c else 2) * einsum("kj,kj,...j->...k", kernels[b], kernels[c], sums[b, c])
            for b, c in sums
        )
        squared_mean = jnp.sum(self.whiten(params, posterior.mean(q_params)) ** 2, axis=-2)
        log_det = posterior.covariance_model.log_det(q_params)
        locations = self.height * self.width
        log_whitening = locations * log_diagonal(self._own(params))
        return 0.5 * (trace + squared_mean - locations - log_det) - log_whitening

    def kl_per_location(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch h w"]:
        """The terms of every location in KL(q ‖ p), in nats: ``[*batch, h, w]``.

        With u the whitened posterior mean and σ² the posterior's marginal variances, the term of
        location a is

            ½ Σ_k [(WΣWᵀ)_ak,ak + u²_ak − 1 − log σ²_ak] − log|V|.

        Where the posterior's entries are independent, it is the divergence from p(z_a | the
        locations before it), averaged over q, and the terms sum to the KL; see
        `KroneckerNormal.kl_per_location` for the others.
        """
        check_sizes(self, posterior)
        kernels = self._kernels(params)
        variances = self._projected_variances(posterior, q_params, kernels)
        mean = self.whiten(params, posterior.mean(q_params))
        log_variance = 2 * jnp.log(posterior.stddev(q_params)).reshape(mean.shape)
        nats = 0.5 * (variances + jnp.sum(mean**2 - 1 - log_variance, axis=-1))
        nats -= jnp.sum(log_diagonal(self._own(params)))
        return nats.reshape(*nats.shape[:-1], self.height, self.width)

    def sample(
        self, key: PRNGKeyArray, params: Params, batch: tuple[int, ...]
    ) -> Float[Array, "*batch h w n"]:
        """Draws one location after the other, ``[*batch, h, w, n]``, of JAX's default float."""
        noise = jax.random.normal(key, (*batch, self.height * self.width, self.maps))
        root = solve_triangular(self._own(params), jnp.eye(self.maps), lower=True)
        weights = params["neighbours"]
        # One row above, and one column on either side, are the zeros beyond the border.
        field = jnp.zeros((*batch, self.height + 1, self.width + 2, self.maps), noise.dtype)

        def draw(at: Array, field: Array) -> Array:
            row, col = at // self.width + 1, at % self.width + 1
            pulls = [
                einsum("...j,jk->...k", field[..., row + y, col + x, :], weights[b])
                for b, (y, x) in enumerate(NEIGHBOURS)
            ]
            white = noise[..., at, :] + sum(pulls)
            return field.at[..., row, col, :].set(einsum("...j,kj->...k", white, root))

        field = lax.fori_loop(0, self.height * self.width, draw, field)
        return params["mean"] + field[..., 1:, 1:-1, :]

    def of_moments(
        self, mean: Float64[np.ndarray, "h w n"], covariance: Float64[np.ndarray, "d d"]
    ) -> Params:
        """The parameters of highest likelihood for latents of these moments: a linear regression.

        Args:
            mean: E[z].
            covariance: Cov[z], ``[hwn, hwn]``, positive definite, of z flattened row by row.
        """
        locations, n = self.height * self.width, self.maps
        blocks = covariance.reshape(locations, n, locations, n)
        sums = np.zeros((_COUNT, n, _COUNT, n))
        for b, c in np.ndindex(_COUNT, _COUNT):
            at = np.nonzero(self.pair_weights(b, c))
            sums[b, :, c] = blocks[at[0], :, at[1]].sum(axis=0)
        return self.of_neighbourhoods(mean, sums)

    def of_neighbourhoods(
        self, mean: Float64[np.ndarray, "h w n"], sums: Float64[np.ndarray, "k n k n"]
    ) -> Params:
        """`of_moments` from all that it needs of the covariance, which may be too large to hold.

        Args:
            mean: E[z].
            sums: the sums over locations a of the covariances of a + b and a + c, by b and c; 0 is
                a itself, and 1 to 4 are its neighbours.
        """
        locations, n = self.height * self.width, self.maps
        own, cross = sums[0, :, 0], sums[1:, :, 0].reshape(-1, n)
        among = sums[1:, :, 1:].reshape(len(cross), len(cross))
        # Where maps have one row or column, some neighbours do not exist.
        weights = np.linalg.lstsq(among, cross, rcond=None)[0]
        residual = (own - cross.T @ weights) / locations
        whitening = np.linalg.inv(np.linalg.cholesky((residual + residual.T) / 2))
        neighbours = (weights @ whitening.T).reshape(_COUNT - 1, n, n)
        return {
            "mean": jnp.asarray(mean, jnp.float32),
            "neighbours": jnp.asarray(neighbours, jnp.float32),
            "maps": triangle(whitening),
        }

    def neighbourhoods(
        self, deviation: Float64[np.ndarray, "*batch h w n"]
    ) -> Float64[np.ndarray, "*batch h w k n"]:
        """Each location's own deviation from the mean, and those of its neighbours."""
        return np.stack([deviation, *_neighbours(deviation, np.pad)], axis=-2)

    @property
    def num_members(self) -> int:
        """How many locations a neighbourhood has: a itself, and its neighbours."""
        return _COUNT

    def pair_weights(self, first: int, second: int) -> Float64[np.ndarray, "hw hw"]:
        """1 at (a + b, a + c) for all locations a that have both, for `Posterior.weighted_trace`.

        A dense matrix, as every covariance takes; for a diagonal one only its diagonal is kept.

        Args:
            first: b, 0 for a itself, or 1 to 4 for a neighbour.
            second: c.
        """
        (y, x), (v, u) = _SHIFTS[first], _SHIFTS[second]
        rows = np.eye(self.height, k=y).T @ np.eye(self.height, k=v)
        cols = np.eye(self.width, k=x).T @ np.eye(self.width, k=u)
        return np.kron(rows, cols)

    def _own(self, params: Params) -> Float[Array, "n n"]:
        """V."""
        return lower_triangular(params["maps"], self.maps)

    def _kernels(self, params: Params) -> list[Float[Array, "n n"]]:
        """The weights of a location and of its neighbours in u: V, and −Bᵀ of each."""
        return [self._own(params), *(-weights.T for weights in params["neighbours"])]

    def _projected_variances(
        self,
        posterior: LatentGaussian,
        q_params: Params,
        kernels: Sequence[Float[Array, "n n"]],
    ) -> Float[Array, "*batch hw"]:
        """Σ_k (WΣWᵀ)_ak,ak of each location a."""

        def variance(rows: Float64[np.ndarray, "hw hw"]) -> Float[Array, "*batch hw n"]:
            return posterior.projected_variances(q_params, jnp.asarray(rows, jnp.float32))

        chosen = [_shift(self, b) for b in range(len(kernels))]
        alone = [variance(rows) for rows in chosen]
        total: Array = jnp.zeros(())
        for b, weights in enumerate(kernels):
            total += einsum("kj,kj,...j->...", weights, weights, alone[b])
            for c in range(b):
                # 2 Cov[x, y] = Var[x + y] − Var[x] − Var[y]
                twice = variance(chosen[b] + chosen[c]) - alone[b] - alone[c]
                total += einsum("kj,kj,...j->...", weights, kernels[c], twice)
        return total


def _neighbours(maps: Any, pad: Callable = jnp.pad) -> list[Any]:
    """Of each location of maps ``[*batch, h, w, n]``, its neighbours; zeros beyond the border."""
    height, width = maps.shape[-3:-1]
    padding = [(0, 0)] * (maps.ndim - 3) + [(1, 0), (1, 1), (0, 0)]
    padded = pad(maps, padding)
    return [padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width, :] for y, x in NEIGHBOURS]


def _shift(prior: Autoregressive, index: int) -> Float64[np.ndarray, "hw hw"]:
    """The matrix that takes locations to themselves (0), or to a neighbour (1, …)."""
    y, x = _SHIFTS[index]
    return np.kron(np.eye(prior.height, k=y), np.eye(prior.width, k=x))
