"""How the mean of a posterior is built: unconstrained, or a sum of R outer products."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax.latents.base import Params, Shapes

NU_STARTS = ("random", "cosine")  # where ν of a low-rank mean starts


@dataclass(frozen=True)
class FreeMean:
    """Every entry of every map is emitted: ``mean [*batch, h, w, n]`` (Eq. 2, 3, 5)."""

    height: int
    width: int
    maps: int

    axes: ClassVar[dict[str, str]] = {"mean": "hw"}

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""
        return {"mean": (self.height, self.width, self.maps)}

    def mean(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The mean M, ``[*batch, h, w, n]``."""
        return params["mean"]

    @property
    def scales(self) -> dict[str, float]:
        """Every array moves at the speed of the encoder's last layer."""
        return {}

    def initial(self, key: PRNGKeyArray) -> Params:
        """One example's initial parameters: at the mean of the prior, whatever the key."""
        del key
        return {name: jnp.zeros(shape) for name, shape in self.shapes.items()}

    def shifted(self, params: Params, deviation: Float[Array, "*batch h w n"]) -> Params:
        """The arrays of the mean M + deviation."""
        return params | {"mean": params["mean"] + deviation}


@dataclass(frozen=True)
class LowRankMean:
    """The mean of each map is Σ_r μ_r ν_rᵀ, of rank R (Eq. 8–9; R = 1 in the paper).

    Emitted are ``mu [*batch, h, r, n]`` and ``nu [*batch, w, r, n]``.

    `nu_scale` multiplies what the encoder emits for ν: as Adam's steps do not depend on the
    gradient's scale, it acts as a multiplier of ν's learning rate. The gradient of ν is
    proportional to μ, which starts at zero, so at first it is mostly noise, which Adam would follow
    at the full rate. `experiments.results.rank` measures what that costs: at a
    thousandth, means of full rank are as good as unconstrained ones.

    `nu_start` is where ν starts: "random", or "cosine", R orthonormal directions, the same for all
    images and maps: the cosines of lowest frequency, of which the first is constant. `shifted` adds
    along these directions, so it goes with this start.
    """

    height: int
    width: int
    maps: int
    rank: int
    nu_scale: float = 0.001
    nu_start: str = "random"

    axes: ClassVar[dict[str, str]] = {"mu": "h", "nu": "w"}

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""
        return {
            "mu": (self.height, self.rank, self.maps),
            "nu": (self.width, self.rank, self.maps),
        }

    def mean(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The mean M_ij = Σ_r μ_ir ν_jr, ``[*batch, h, w, n]``."""
        # Copies side by side, not a broadcast, whose gradient is a sum over an axis of a few: on a
        # CPU those sums alone would take longer than all else that a posterior computes. And not
        # an einsum: accelerators would round a matrix product of float32 to fewer bits.
        mu = jnp.stack([params["mu"]] * self.width, axis=-3)
        nu = jnp.stack([params["nu"]] * self.height, axis=-4)
        return jnp.sum(mu * nu, axis=-2)

    @property
    def scales(self) -> dict[str, float]:
        """The factor on what an encoder emits for ν."""
        return {"nu": self.nu_scale}

    def initial(self, key: PRNGKeyArray) -> Params:
        """One example's initial parameters: μ at zero, ν off it.

        With both at zero the mean is an even function of the features, M(f) = M(−f), and emitting
        nothing is a saddle. With ν_r random, of unit root mean square over the width, the mean
        still starts at zero, but to first order it is linear in the features.
        """
        mu = jnp.zeros(self.shapes["mu"])
        if self.nu_start == "cosine":
            directions = jnp.asarray(cosines(self.width, self.rank))
            return {"mu": mu, "nu": jnp.broadcast_to(directions[..., None], self.shapes["nu"])}
        nu = jax.random.normal(key, self.shapes["nu"])
        unit_nu = nu / jnp.sqrt(jnp.mean(nu**2, axis=0))
        return {"mu": mu, "nu": unit_nu}

    def shifted(self, params: Params, deviation: Float[Array, "*batch h w n"]) -> Params:
        """The arrays with the part of the deviation that the directions of `nu_start` span.

        While ν is at these directions, the mean becomes M + deviation · VVᵀ with V ``[w, R]``; at
        R = w that is all of the deviation.

        Raises:
            ValueError: ν starts elsewhere.
        """
        if self.nu_start != "cosine":
            raise ValueError(
                f"nu_start must be 'cosine' for a shifted mean, got nu_start={self.nu_start!r}"
            )
        directions = jnp.asarray(cosines(self.width, self.rank), deviation.dtype)
        along = jnp.einsum(
            "...hwn,wr->...hrn", deviation, directions, precision=lax.Precision.HIGHEST
        )
        return params | {"mu": params["mu"] + along}


def cosines(size: int, count: int) -> Float[np.ndarray, "{size} {count}"]:
    """The first `count` columns of the orthonormal cosine basis (DCT-II) of `size` values."""
    place, frequency = np.arange(size)[:, None] + 0.5, np.arange(count)
    columns = np.cos(np.pi * place * frequency / size)
    return (columns / np.linalg.norm(columns, axis=0)).astype(np.float32)
