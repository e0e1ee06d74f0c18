"""The posterior: a mean and a covariance joined."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.latents import base
from svae_jax.latents.base import (
    Axes,
    Covariance,
    Mean,
    Params,
    Shapes,
    TotalCovariance,
    WeightedTrace,
)
from svae_jax.latents.priors import StandardNormal


@dataclass(frozen=True)
class Posterior:
    """A distribution q(z|x) over latent maps z ``[*batch, h, w, n]``; the N maps are independent.

    It holds sizes and no arrays, so it is hashable and goes through `jax.jit` as a static
    argument: each method takes the parameters as `params`, whose dtype is that of the results.

    Attributes:
        name: its row in the table of posteriors.
        mean_model: how the mean is built.
        covariance_model: how the covariance is built.
    """

    name: str
    mean_model: Mean
    covariance_model: Covariance

    @property
    def height(self) -> int:
        """The number of rows h of a map."""
        return self.mean_model.height

    @property
    def width(self) -> int:
        """The number of columns w of a map."""
        return self.mean_model.width

    @property
    def maps(self) -> int:
        """The number of maps N."""
        return self.mean_model.maps

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and maps: the shape of one z."""
        return self.height, self.width, self.maps

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example of every array in `params`, in the order of emission."""
        return self.mean_model.shapes | self.covariance_model.shapes

    @property
    def axes(self) -> dict[str, str]:
        """Array -> the axes of a map along which it begins: "hw", "h" or "w"; absent: neither."""
        parts = (self.mean_model, self.covariance_model)
        known = [part.axes for part in parts if isinstance(part, Axes)]
        return {name: axes for part in known for name, axes in part.items()}

    @property
    def num_params(self) -> int:
        """The number of parameters that the encoder emits per example (§4.4 of the paper)."""
        return base.count(self.shapes)

    def unpack(self, flat: Float[Array, "*batch num_params"]) -> Params:
        """Splits what the encoder emitted into named parameters.

        Args:
            flat: ``[*batch, num_params]``.

        Returns:
            name -> ``[*batch, *shape]`` for the names and shapes of `shapes`.

        Raises:
            ValueError: the last dimension is not `num_params`.
        """
        if flat.shape[-1:] != (self.num_params,):
            raise ValueError(
                f"flat must end in num_params = {self.num_params} entries, got shape {flat.shape}"
            )
        return base.unpack(self.shapes, flat)

    def initial_bias(self, key: PRNGKeyArray) -> Float[Array, " num_params"]:
        """The bias ``[num_params]`` with which an encoder's last layer should start.

        It is the prior, mean zero and variance one. All of it is zero but for the ν of a low-rank
        mean (see `LowRankMean.initial`), which are drawn from the key.
        """
        prior_covariance = {
            name: jnp.zeros(shape) for name, shape in self.covariance_model.shapes.items()
        }
        return base.pack(self.shapes, self.mean_model.initial(key) | prior_covariance)

    def bias_of(
        self, key: PRNGKeyArray, log_variance: Float[Array, " n"]
    ) -> Float[Array, " num_params"]:
        """As `initial_bias`, with these log-variances of the maps in place of the prior's.

        Raises:
            ValueError: the covariance has no method `of_log_variance`.
        """
        if not hasattr(self.covariance_model, "of_log_variance"):
            raise ValueError(f"the covariance of {self.name} has no method of_log_variance")
        covariance = self.covariance_model.of_log_variance(log_variance)
        return base.pack(self.shapes, self.mean_model.initial(key) | covariance)

    def shifted(self, params: Params, deviation: Float[Array, "*batch h w n"]) -> Params:
        """The arrays of a posterior whose mean is moved by a deviation, as far as it can be.

        For a full mean the new mean is M + deviation; for a low-rank one see
        `LowRankMean.shifted`.
        """
        return self.mean_model.shifted(params, deviation)

    @property
    def output_scale(self) -> Float[np.ndarray, " num_params"]:
        """The factor ``[num_params]`` on what an encoder's last layer emits.

        All of it is one but for the ν of a low-rank mean (see `LowRankMean.scales`) and the factors
        of a full covariance (see `KroneckerFull`). With Adam, whose steps do not depend on the
        gradient's scale, it acts as a multiplier of the learning rate.
        """
        scales = {**self.mean_model.scales, **getattr(self.covariance_model, "scales", {})}
        parts = [
            np.full(math.prod(shape), scales.get(name, 1.0), np.float32)
            for name, shape in self.shapes.items()
        ]
        return np.concatenate(parts)

    def mean(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The mean M, ``[*batch, h, w, n]``."""
        return self.mean_model.mean(params)

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The marginal standard deviation of every entry, ``[*batch, h, w, n]``."""
        return self.covariance_model.stddev(params)

    def covariance(self, params: Params) -> Float[Array, "*batch n hw hw"]:
        """The covariance SSᵀ of each map's entries, ``[*batch, n, hw, hw]``, flattened row-major.

        For a matrix-variate normal it is Ω⊗Ψ (Eq. 7). Maps are independent of each other, so these
        blocks are the whole covariance of z.
        """
        h, w, n = self.height, self.width, self.maps
        batch = self.mean(params).shape[:-3]
        dtype = jnp.result_type(*params.values())
        units = jnp.eye(h * w, dtype=dtype).reshape(h * w, *(1 for _ in batch), h, w, 1)
        units = jnp.broadcast_to(units, (h * w, *batch, h, w, n))
        columns = jax.vmap(lambda unit: self.covariance_model.colour(params, unit))(units)
        root = columns.reshape(h * w, *batch, h * w, n)
        # Precision: accelerators would round the factors of a float32 product to fewer bits.
        return jnp.einsum("k...in,k...jn->...nij", root, root, precision=lax.Precision.HIGHEST)

    def total_covariance(
        self, params: Params, weights: Float[Array, " batch"]
    ) -> Float[Array, "n hw hw"]:
        """Σ_b weights_b · Σ_b of every map, over a batch, without an array for each example.

        Args:
            params: from `unpack`, with one batch axis.
            weights: of the examples, ``[batch]``.
        """
        if isinstance(self.covariance_model, TotalCovariance):
            return self.covariance_model.total_covariance(params, weights)

        def add(total: Float[Array, "n hw hw"], example: tuple) -> tuple:
            weight, params = example
            return total + weight * self.covariance(params), None

        cells = self.height * self.width
        zeros = jnp.zeros((self.maps, cells, cells), jnp.result_type(*params.values()))
        return lax.scan(add, zeros, (weights, params))[0]

    def weighted_trace(
        self, params: Params, weights: Float[Array | np.ndarray, "hw hw"]
    ) -> Float[Array, "*batch n"]:
        """tr(weights · Σ_k) for the covariance Σ_k of every map k: ``[*batch, n]``.

        Args:
            params: from `unpack`.
            weights: ``[hw, hw]``, over the row-major flattening of a map.
        """
        if isinstance(self.covariance_model, WeightedTrace):
            return self.covariance_model.weighted_trace(params, weights)
        weights = jnp.asarray(weights)
        transposed = self._transposed_root(params, weights.dtype)

        @jax.checkpoint  # otherwise a gradient would store hw arrays [*batch, h, w, n]
        def term(rows: Float[Array, "2 hw"]) -> Float[Array, "*batch n"]:
            return jnp.sum(transposed(rows[0]) * transposed(rows[1]), axis=(-3, -2))

        # tr(P SSᵀ) = Σ_a ⟨SᵀP_a, Sᵀe_a⟩, with P_a the rows of P and e_a those of the identity
        units = jnp.eye(len(weights), dtype=weights.dtype)
        return jnp.sum(lax.map(term, jnp.stack([weights, units], axis=1)), axis=0)

    def projected_variances(
        self, params: Params, rows: Float[Array, "r hw"]
    ) -> Float[Array, "*batch r n"]:
        """The variance of every row's scalar product with every map: ``[*batch, r, n]``.

        It is the diagonal of rows · Σ_k · rowsᵀ for the covariance Σ_k of map k.

        Args:
            params: from `unpack`.
            rows: ``[r, hw]``, over the row-major flattening of a map.
        """
        transposed = self._transposed_root(params, rows.dtype)
        variances = lax.map(lambda row: jnp.sum(transposed(row) ** 2, axis=(-3, -2)), rows)
        return jnp.moveaxis(variances, 0, -2)

    def sample(self, key: PRNGKeyArray, params: Params) -> Float[Array, "*batch h w n"]:
        """Draws z = M + A E Bᵀ, differentiable in `params` (Eq. 2, 4, 6, 9).

        Returns:
            One sample per example, ``[*batch, h, w, n]``.
        """
        mean = self.mean(params)
        return mean + self.covariance_model.colour(params, _noise_like(key, mean))

    def sample_and_log_prob(
        self, key: PRNGKeyArray, params: Params
    ) -> tuple[Float[Array, "*batch h w n"], Float[Array, "*batch"]]:
        """Draws z as `sample` does, and returns log q(z|x) with it.

        The density comes from the noise, not from z − M: it stays exact in float32 where the
        standard deviation is below the rounding of the mean.

        Returns:
            z ``[*batch, h, w, n]`` and log q(z|x) ``[*batch]`` in nats.
        """
        mean = self.mean(params)
        noise = _noise_like(key, mean)
        z = mean + self.covariance_model.colour(params, noise)
        return z, self._log_density(params, noise)

    def log_prob(self, params: Params, z: Float[Array, "*shape"]) -> Float[Array, "*batch"]:
        """The log-density log q(z|x) in nats, summed over the maps.

        Args:
            params: from `unpack`.
            z: ``[*batch, h, w, n]``, the batch that of `params`.

        Returns:
            ``[*batch]``.

        Raises:
            ValueError: z has another shape than the mean.
        """
        mean = self.mean(params)
        if z.shape != mean.shape:
            raise ValueError(
                f"z must have the shape [*batch, h, w, n] = {mean.shape}, got {z.shape}"
            )
        return self._log_density(params, self.covariance_model.whiten(params, z - mean))

    def kl(self, params: Params) -> Float[Array, "*batch"]:
        """KL(q(z|x) ‖ N(0, I)) in nats, summed over the maps: ``[*batch]``."""
        return jnp.sum(self.kl_per_map(params), axis=-1)

    def kl_per_map(self, params: Params) -> Float[Array, "*batch n"]:
        """KL(q(z|x) ‖ N(0, I)) in nats of every map: ``[*batch, n]``.

        For the matrix-variate normal of Eq. 5 and 8 on h×w maps,

            KL = ½ [tr Ω · tr Ψ + ‖M‖² − hw − w·log|Ω| − h·log|Ψ|],

        and for independent entries (Eq. 2, 3) it is ½ Σ_ij (σ²_ij + m²_ij − 1 − log σ²_ij).
        """
        return self._standard_prior.kl_per_map(self, params, {})

    def marginal_kl(self, params: Params) -> Float[Array, "*batch h w n"]:
        """KL(q(z_ij|x) ‖ N(0, 1)) in nats of every entry's marginal: ``[*batch, h, w, n]``.

        ½ (σ²_ij + m²_ij − 1 − log σ²_ij). The prior's entries are independent, so this sums to `kl`
        where the posterior's are too. For `mvn_full` and `lowrank_full` the sum is lower: it leaves
        out the divergence of q from the product of its marginals.
        """
        return self._standard_prior.marginal_kl(self, params)

    @property
    def _standard_prior(self) -> StandardNormal:
        """N(0, I) over maps of the same sizes."""
        return StandardNormal(self.height, self.width, self.maps)

    def _transposed_root(
        self, params: Params, dtype: jnp.dtype
    ) -> Callable[[Float[Array, " hw"]], Float[Array, "*batch h w n"]]:
        """The function row -> Sᵀ·row of every map: the transpose of `colour`, by its gradient."""
        mean = self.mean(params)
        noise = jnp.zeros_like(mean, dtype=jnp.result_type(mean, dtype))
        coloured, transpose = jax.vjp(partial(self.covariance_model.colour, params), noise)

        def apply(row: Float[Array, " hw"]) -> Float[Array, "*batch h w n"]:
            row = row.reshape(self.height, self.width, 1).astype(coloured.dtype)
            return transpose(jnp.broadcast_to(row, coloured.shape))[0]

        return apply

    def _log_density(
        self, params: Params, noise: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch"]:
        """The log-density log q(z|x) at the z to which the white noise leads."""
        log_det = self.covariance_model.log_det(params)
        squared_noise = jnp.sum(noise**2, axis=(-3, -2))
        constant = self.height * self.width * math.log(2 * math.pi)
        return -0.5 * jnp.sum(squared_noise + log_det + constant, axis=-1)


def _noise_like(
    key: PRNGKeyArray, mean: Float[Array, "*batch h w n"]
) -> Float[Array, "*batch h w n"]:
    """White noise of the mean's shape and dtype."""
    return jax.random.normal(key, mean.shape, mean.dtype)
