"""Some cells of a latent given the others, under a Gaussian: closed forms for filling in."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, PRNGKeyArray, PyTree

from svae_jax.samplers import base

Latents = Float[np.ndarray, "*b h w n"]


class Factors(NamedTuple):
    """The Gaussian N(mean, first ⊗ second) over the row-major flattening of ``[h, w, n]``.

    Attributes:
        mean: ``[h, w, n]``.
        first: covariance ``[a, a]`` of the locations (a = hw), or of all entries (a = hwn).
        second: covariance ``[b, b]`` of the maps (b = n), or of nothing else (b = 1).
    """

    mean: Float64[np.ndarray, "h w n"]
    first: Float64[np.ndarray, "a a"]
    second: Float64[np.ndarray, "b b"]


@runtime_checkable
class HasFactors(Protocol):
    """A sampler that is a Gaussian."""

    def factors(self, params: PyTree) -> Factors:
        """Its mean and covariance, from the arrays that `sample` takes."""


class Conditional(NamedTuple):
    """p(z of unknown cells | z of known cells).

    With rows Z_u and Z_k of the ``[a, b]`` matrix of z − mean that belong to unknown and to known
    cells,

        Z_u | Z_k ~ N(G Z_k, S ⊗ second),    G = C_uk C_kk⁻¹,    S = C_uu − G C_ku,

    for the covariance C of the rows.

    Attributes:
        mean: E[z], ``[h, w, n]``.
        unknown: which rows are drawn, ``[a]``.
        gain: G, ``[u, k]``.
        lower: the lower Cholesky factor of S, ``[u, u]``.
        second: the lower Cholesky factor of `second`, ``[b, b]``.
    """

    mean: Float64[np.ndarray, "h w n"]
    unknown: Bool[np.ndarray, " a"]
    gain: Float64[np.ndarray, "u k"]
    lower: Float64[np.ndarray, "u u"]
    second: Float64[np.ndarray, "b b"]

    def expected(self, z: Latents) -> Latents:
        """Puts the conditional mean into the unknown cells of each latent."""
        rows = self._rows(z)
        rows[..., self.unknown, :] = self.gain @ rows[..., ~self.unknown, :]
        return self._latents(rows)

    def sample(
        self, key: PRNGKeyArray, z: Float[np.ndarray, "h w n"], count: int
    ) -> Float[np.ndarray, "{count} h w n"]:
        """Draws the unknown cells of one latent `count` times; number i depends on i alone."""
        rows = np.repeat(self._rows(self.expected(z))[None], count, axis=0)
        shape = (int(self.unknown.sum()), rows.shape[-1])
        noise = np.asarray(base.normal(base.image_keys(key, np.arange(count)), shape), np.float64)
        rows[:, self.unknown] += self.lower @ noise @ self.second.T
        return self._latents(rows)

    def _rows(self, z: Latents) -> Float64[np.ndarray, "*b a b"]:
        deviation = np.asarray(z, np.float64) - self.mean
        return deviation.reshape(*z.shape[:-3], len(self.unknown), len(self.second))

    def _latents(self, rows: Float64[np.ndarray, "*b a b"]) -> Latents:
        latents = rows.reshape(*rows.shape[:-2], *self.mean.shape) + self.mean
        return latents.astype(np.float32)


def condition(factors: Factors, unknown: Bool[np.ndarray, "h w"]) -> Conditional:
    """The distribution of the unknown cells given the others, computed in float64.

    Args:
        factors: the Gaussian.
        unknown: which cells are drawn.
    """
    mean, first, second = factors
    rows = np.repeat(unknown.ravel(), len(first) // unknown.size)
    across = first[np.ix_(rows, ~rows)]
    gain = np.zeros_like(across)
    if across.size:
        known = base.cholesky(first[np.ix_(~rows, ~rows)])
        gain = np.linalg.solve(known @ known.T, across.T).T
    rest = first[np.ix_(rows, rows)] - gain @ across.T
    lower = base.cholesky((rest + rest.T) / 2) if rest.size else rest
    return Conditional(mean, rows, gain, lower, base.cholesky(second))
