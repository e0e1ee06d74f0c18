"""How the covariance of a posterior is built: independent entries, or Ω⊗Ψ, diagonal or full.

Each kind offers the primitives of `base.Covariance` per map, and `posterior` writes sampling,
density and KL once for all kinds. S is a square root of the covariance of a map's hw entries.

For a matrix-variate normal, S E = A E Bᵀ with Ω = AAᵀ over the rows and Ψ = BBᵀ over the columns:
the covariance is Ω⊗Ψ over the *row-major* flattening of a map. (An erratum: the paper states Eq. 7
for the column-stacking vec, for which it would be Ψ⊗Ω.)

The encoder emits log-variances; at zero, all of these are the standard normal prior.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from svae_jax.latents.base import Params, Shapes


@dataclass(frozen=True)
class Independent:
    """Every entry has a variance of its own: ``log_variance [*batch, h, w, n]`` (Eq. 2, 3)."""

    height: int
    width: int
    maps: int

    axes: ClassVar[dict[str, str]] = {"log_variance": "hw"}

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""
        return {"log_variance": (self.height, self.width, self.maps)}

    def of_log_variance(self, log_variance: Float[Array, " n"]) -> Params:
        """The arrays of one example whose maps have these log-variances at all locations."""
        return {"log_variance": jnp.broadcast_to(log_variance, self.shapes["log_variance"])}

    def colour(
        self, params: Params, noise: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """σ_ij ε_ij (Eq. 4, whose subscript `i*j` means the pair (i, j))."""
        return jnp.exp(0.5 * params["log_variance"]) * noise

    def whiten(
        self, params: Params, deviation: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """The inverse of `colour`."""
        return jnp.exp(-0.5 * params["log_variance"]) * deviation

    def log_det(self, params: Params) -> Float[Array, "*batch n"]:
        """Σ_ij log σ²_ij."""
        return jnp.sum(params["log_variance"], axis=(-3, -2))

    def trace(self, params: Params) -> Float[Array, "*batch n"]:
        """Σ_ij σ²_ij."""
        return jnp.sum(jnp.exp(params["log_variance"]), axis=(-3, -2))

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """σ_ij."""
        return jnp.exp(0.5 * params["log_variance"])

    def weighted_trace(
        self, params: Params, weights: Float[Array | np.ndarray, "hw hw"]
    ) -> Float[Array, "*batch n"]:
        """Σ_ij P_ij,ij σ²_ij."""
        return _diagonal_trace(jnp.exp(params["log_variance"]), weights)

    def total_covariance(
        self, params: Params, weights: Float[Array, " batch"]
    ) -> Float[Array, "n hw hw"]:
        """Σ_b weights_b · diag(σ²)_b."""
        return _total_diagonal(jnp.exp(params["log_variance"]), weights)


@dataclass(frozen=True)
class KroneckerDiagonal:
    """Ω⊗Ψ with both diagonal, so that Var z_ij = ω_i ψ_j (Eq. 5–6, 8–9).

    Emitted are log ω as ``row_log_variance [*batch, h, n]`` and log ψ as
    ``col_log_variance [*batch, w, n]``. Only their products matter: (Ω·c, Ψ/c) is the same.
    """

    height: int
    width: int
    maps: int

    axes: ClassVar[dict[str, str]] = {"row_log_variance": "h", "col_log_variance": "w"}

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""
        return {
            "row_log_variance": (self.height, self.maps),
            "col_log_variance": (self.width, self.maps),
        }

    def of_log_variance(self, log_variance: Float[Array, " n"]) -> Params:
        """The arrays of one example whose maps have these log-variances at all locations."""
        arrays = {name: jnp.zeros(shape) for name, shape in self.shapes.items()}
        for name in ("row_log_variance", "col_log_variance"):
            arrays[name] = jnp.broadcast_to(0.5 * log_variance, self.shapes[name])
        return arrays

    def colour(
        self, params: Params, noise: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """sqrt(ω_i ψ_j) ε_ij (Eq. 6 and 9, whose subscript `i*j` means the pair (i, j))."""
        return jnp.exp(0.5 * _entry_log_variance(params)) * noise

    def whiten(
        self, params: Params, deviation: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """The inverse of `colour`."""
        return jnp.exp(-0.5 * _entry_log_variance(params)) * deviation

    def log_det(self, params: Params) -> Float[Array, "*batch n"]:
        """log|Ω⊗Ψ| = w·log|Ω| + h·log|Ψ|: each determinant is weighted by the other side."""
        log_det_omega = jnp.sum(params["row_log_variance"], axis=-2)
        log_det_psi = jnp.sum(params["col_log_variance"], axis=-2)
        return self.width * log_det_omega + self.height * log_det_psi

    def trace(self, params: Params) -> Float[Array, "*batch n"]:
        """tr(Ω⊗Ψ) = tr Ω · tr Ψ."""
        omega, psi = self.variances(params)
        return jnp.sum(omega, axis=-2) * jnp.sum(psi, axis=-2)

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """sqrt(ω_i ψ_j)."""
        return jnp.exp(0.5 * _entry_log_variance(params))

    def weighted_trace(
        self, params: Params, weights: Float[Array | np.ndarray, "hw hw"]
    ) -> Float[Array, "*batch n"]:
        """Σ_ij P_ij,ij ω_i ψ_j."""
        return _diagonal_trace(jnp.exp(_entry_log_variance(params)), weights)

    def total_covariance(
        self, params: Params, weights: Float[Array, " batch"]
    ) -> Float[Array, "n hw hw"]:
        """Σ_b weights_b · (Ω⊗Ψ)_b, diagonal."""
        return _total_diagonal(jnp.exp(_entry_log_variance(params)), weights)

    def variances(
        self, params: Params
    ) -> tuple[Float[Array, "*batch h n"], Float[Array, "*batch w n"]]:
        """The diagonals of Ω and of Ψ."""
        return jnp.exp(params["row_log_variance"]), jnp.exp(params["col_log_variance"])


@dataclass(frozen=True)
class KroneckerFull(KroneckerDiagonal):
    """Ω⊗Ψ with both full: real dependence between locations (beyond the paper).

    Ω = AAᵀ with A = L·diag(exp(½ log-variance)), L unit lower triangular, and Ψ = BBᵀ likewise. To
    the log-variances of `KroneckerDiagonal` come the entries of each L below its diagonal, row by
    row: ``row_lower [*batch, h(h-1)/2, n]`` and ``col_lower [*batch, w(w-1)/2, n]``. As |L| = 1,
    the log-variances alone make the determinant, and extreme ones stay exact.

    `lower_scale` multiplies what the encoder emits for the entries of L: as Adam's steps do not
    depend on the gradient's scale, it acts as a multiplier of their learning rate. At the full rate
    they would be noise before they are of use.
    """

    lower_scale: float = 0.1

    @property
    def scales(self) -> dict[str, float]:
        """The factor on what an encoder emits for the entries of L."""
        return {"row_lower": self.lower_scale, "col_lower": self.lower_scale}

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""
        return super().shapes | {
            "row_lower": (self.height * (self.height - 1) // 2, self.maps),
            "col_lower": (self.width * (self.width - 1) // 2, self.maps),
        }

    def colour(
        self, params: Params, noise: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """A E Bᵀ."""
        rows, cols = self._factors(params)
        scaled = super().colour(params, noise)
        # Precision: accelerators would round the factors of a float32 product to fewer bits.
        return jnp.einsum(
            "...ikn,...kln,...jln->...ijn", rows, scaled, cols, precision=lax.Precision.HIGHEST
        )

    def whiten(
        self, params: Params, deviation: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """A⁻¹ D B⁻ᵀ, the inverse of `colour`."""
        # The solves see the unit factors only; the scales come last.
        rows, cols = (jnp.moveaxis(factor, -1, -3) for factor in self._factors(params))
        solve = partial(lax.linalg.triangular_solve, lower=True, unit_diagonal=True)
        unscaled = solve(rows, jnp.moveaxis(deviation, -1, -3), left_side=True)
        unscaled = solve(cols, unscaled, left_side=False, transpose_a=True)
        return super().whiten(params, jnp.moveaxis(unscaled, -3, -1))

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """sqrt(Ω_ii Ψ_jj)."""
        omega, psi = self.variances(params)
        # Two roots: the product of two tiny variances would lose its bits.
        return jnp.sqrt(omega)[..., :, None, :] * jnp.sqrt(psi)[..., None, :, :]

    def weighted_trace(
        self, params: Params, weights: Float[Array | np.ndarray, "hw hw"]
    ) -> Float[Array, "*batch n"]:
        """Σ_ijkl P_ij,kl Ω_ik Ψ_jl, without the array Ω⊗Ψ."""
        omega, psi = self._sides(params)
        blocks = weights.reshape(self.height, self.width, self.height, self.width)
        weighted = _einsum("ijkl,...ikn->...jln", blocks, omega)
        return jnp.sum(weighted * psi, axis=(-3, -2))

    def total_covariance(
        self, params: Params, weights: Float[Array, " batch"]
    ) -> Float[Array, "n hw hw"]:
        """Σ_b weights_b · (Ω⊗Ψ)_b."""
        omega, psi = self._sides(params)
        weighted = omega * weights[:, None, None, None]
        blocks = _einsum("bikn,bjln->nijkl", weighted, psi)
        cells = self.height * self.width
        return blocks.reshape(self.maps, cells, cells)

    def variances(
        self, params: Params
    ) -> tuple[Float[Array, "*batch h n"], Float[Array, "*batch w n"]]:
        """The diagonals of Ω and of Ψ: Ω_ii = Σ_k L_ik² exp(log-variance_k)."""
        omega, psi = super().variances(params)
        rows, cols = self._factors(params)
        return (
            jnp.sum(rows**2 * omega[..., None, :, :], axis=-2),
            jnp.sum(cols**2 * psi[..., None, :, :], axis=-2),
        )

    def _sides(
        self, params: Params
    ) -> tuple[Float[Array, "*batch h h n"], Float[Array, "*batch w w n"]]:
        """Ω and Ψ."""
        rows, cols = self._factors(params)
        omega, psi = super().variances(params)
        omega = _einsum("...imn,...mn,...kmn->...ikn", rows, omega, rows)
        return omega, _einsum("...jmn,...mn,...lmn->...jln", cols, psi, cols)

    def _factors(
        self, params: Params
    ) -> tuple[Float[Array, "*batch h h n"], Float[Array, "*batch w w n"]]:
        """The unit lower triangular factor L of the rows and that of the columns."""
        return (
            _unit_lower(params["row_lower"], self.height),
            _unit_lower(params["col_lower"], self.width),
        )


def _entry_log_variance(params: Params) -> Float[Array, "*batch h w n"]:
    """log(ω_i ψ_j): added as logarithms, so that neither side overflows alone."""
    return params["row_log_variance"][..., :, None, :] + params["col_log_variance"][..., None, :, :]


# Precision: accelerators would round the factors of a float32 product to fewer bits.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _total_diagonal(
    variance: Float[Array, "batch h w n"], weights: Float[Array, " batch"]
) -> Float[Array, "n hw hw"]:
    """Σ_b weights_b · diag(variance)_b of every map."""
    total = jnp.sum(weights[:, None, None, None] * variance, axis=0)
    h, w, n = total.shape
    return total.reshape(h * w, n).T[:, :, None] * jnp.eye(h * w, dtype=total.dtype)


def _diagonal_trace(
    variance: Float[Array, "*batch h w n"], weights: Float[Array | np.ndarray, "hw hw"]
) -> Float[Array, "*batch n"]:
    """tr(weights · Σ) for a diagonal Σ: only the diagonal of the weights counts."""
    # Of constant weights, only the diagonal becomes part of the program.
    diagonal = (np if isinstance(weights, np.ndarray) else jnp).diagonal(weights)
    return jnp.sum(diagonal.reshape(*variance.shape[-3:-1], 1) * variance, axis=(-3, -2))


def _unit_lower(lower: Float[Array, "*batch entries n"], size: int) -> Float[Array, "*batch d d n"]:
    """The unit lower triangular matrices of ``size`` whose entries below the diagonal are given."""
    rows, cols = np.tril_indices(size, -1)
    *batch, _, maps = lower.shape
    unit = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype)[..., None], (*batch, size, size, maps))
    return unit.at[..., rows, cols, :].set(lower)
