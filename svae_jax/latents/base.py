"""The protocols of priors and of the parts of posteriors, and arrays as one flat vector."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, PRNGKeyArray

Params = dict[str, Float[Array, "..."]]
"""Arrays by name: a posterior's, the batch axes in front of each, or a prior's, without any."""

Shapes = dict[str, tuple[int, ...]]
"""The shape of each array for one example."""


@runtime_checkable
class Sizes(Protocol):
    """The sizes of latent maps."""

    @property
    def height(self) -> int:
        """Rows h of a map."""

    @property
    def width(self) -> int:
        """Columns w of a map."""

    @property
    def maps(self) -> int:
        """The number of maps N."""


@runtime_checkable
class Mean(Sizes, Protocol):
    """How the mean of each map is built from emitted arrays; frozen and hashable."""

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""

    def mean(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The mean M, ``[*batch, h, w, n]``."""

    @property
    def scales(self) -> Mapping[str, float]:
        """Array -> the factor on what an encoder emits for it, where that is not 1."""

    def initial(self, key: PRNGKeyArray) -> Params:
        """One example's arrays at the start of training."""

    def shifted(self, params: Params, deviation: Float[Array, "*batch h w n"]) -> Params:
        """The arrays of a mean that is moved by a deviation, as far as it can be."""


@runtime_checkable
class Covariance(Protocol):
    """How the covariance SSᵀ of each map's hw entries is built; frozen and hashable.

    All arrays at zero must give the identity, the covariance of the prior.
    """

    @property
    def shapes(self) -> Shapes:
        """Name -> shape for one example."""

    def colour(
        self, params: Params, noise: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """S·noise."""

    def whiten(
        self, params: Params, deviation: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch h w n"]:
        """The inverse of `colour`."""

    def log_det(self, params: Params) -> Float[Array, "*batch n"]:
        """log|SSᵀ|."""

    def trace(self, params: Params) -> Float[Array, "*batch n"]:
        """tr SSᵀ."""

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The root of the diagonal of SSᵀ."""


@runtime_checkable
class Axes(Protocol):
    """An optional attribute of a `Mean` or a `Covariance`; see `Posterior.axes`."""

    axes: Mapping[str, str]


@runtime_checkable
class WeightedTrace(Protocol):
    """An optional method of a `Covariance`: `Posterior.weighted_trace` in closed form.

    Without it, the trace takes 2hw passes through the gradient of `colour`.
    """

    def weighted_trace(
        self, params: Params, weights: Float[Array | np.ndarray, "hw hw"]
    ) -> Float[Array, "*batch n"]:
        """tr(weights · SSᵀ)."""


@runtime_checkable
class TotalCovariance(Protocol):
    """An optional method of a `Covariance`: `Posterior.total_covariance` in closed form.

    Without it, examples are taken one by one.
    """

    def total_covariance(
        self, params: Params, weights: Float[Array, " batch"]
    ) -> Float[Array, "n hw hw"]:
        """Σ_b weights_b · (SSᵀ)_b."""


@runtime_checkable
class LatentGaussian(Sizes, Protocol):
    """What a prior needs of a posterior: a Gaussian with independent maps; see `Posterior`."""

    @property
    def covariance_model(self) -> Covariance:
        """How the covariance is built."""

    def mean(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The mean M, ``[*batch, h, w, n]``."""

    def stddev(self, params: Params) -> Float[Array, "*batch h w n"]:
        """The marginal standard deviation of every entry, ``[*batch, h, w, n]``."""

    def weighted_trace(
        self, params: Params, weights: Float[Array | np.ndarray, "hw hw"]
    ) -> Float[Array, "*batch n"]:
        """tr(weights · Σ_k) of every map k."""

    def projected_variances(
        self, params: Params, rows: Float[Array, "r hw"]
    ) -> Float[Array, "*batch r n"]:
        """The diagonal of rows · Σ_k · rowsᵀ of every map k."""


@runtime_checkable
class Prior(Sizes, Protocol):
    """A distribution p(z) over latent maps z ``[*batch, h, w, n]``; frozen and hashable.

    `q_params` are the arrays of a posterior q(z|x), `params` the learned arrays of the prior.
    """

    @property
    def name(self) -> str:
        """Its row in the table of priors."""

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of the learned arrays."""

    @property
    def num_params(self) -> int:
        """The number of learned parameters."""

    def initial(self) -> Params:
        """The learned arrays at the start of training, where the prior is N(0, I)."""

    def mean(self, params: Params) -> Float[Array, "h w n"]:
        """E[z], ``[h, w, n]``."""

    def kl_per_map(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch n"]:
        """KL(q(z|x) ‖ p(z)) in nats as a sum over maps: ``[*batch, n]``."""

    def kl_per_location(
        self, posterior: LatentGaussian, q_params: Params, params: Params
    ) -> Float[Array, "*batch h w"]:
        """The terms of every location in KL(q(z|x) ‖ p(z)), in nats: ``[*batch, h, w]``."""

    def log_prob(self, params: Params, z: Float[Array, "*batch h w n"]) -> Float[Array, "*batch"]:
        """log p(z) in nats: ``[*batch]``."""

    def sample(
        self, key: PRNGKeyArray, params: Params, batch: tuple[int, ...]
    ) -> Float[Array, "*batch h w n"]:
        """Draws z ``[*batch, h, w, n]``, of JAX's default float."""


@runtime_checkable
class StartsAtMoments(Protocol):
    """An optional method of a `Prior`: its parameters from the moments of latents.

    With it, a model that starts at PCA starts at the aggregate posterior's, too.
    """

    def of_moments(
        self, mean: Float64[np.ndarray, "h w n"], covariance: Float64[np.ndarray, "d d"]
    ) -> Params:
        """The parameters of highest likelihood for latents of this mean and covariance."""


@runtime_checkable
class StartsAtNeighbourhoods(Protocol):
    """Optional methods of a `Prior`: the same from the moments of neighbouring locations.

    A neighbourhood is a location a and its neighbours: member 0 is a itself, member b its b-th
    neighbour.
    """

    @property
    def num_members(self) -> int:
        """How many locations a neighbourhood has."""

    def neighbourhoods(
        self, deviation: Float64[np.ndarray, "*batch h w n"]
    ) -> Float64[np.ndarray, "*batch h w k n"]:
        """The deviations from the mean of the members of each location's neighbourhood."""

    def pair_weights(self, first: int, second: int) -> Float64[np.ndarray, "hw hw"]:
        """1 at (member b of a, member c of a) for each location a that has both, else 0."""

    def of_neighbourhoods(
        self, mean: Float64[np.ndarray, "h w n"], sums: Float64[np.ndarray, "k n k n"]
    ) -> Params:
        """The parameters of highest likelihood.

        Args:
            mean: E[z].
            sums: the covariances of all pairs of members, each summed over locations.
        """


def check_positive(**sizes: object) -> None:
    """Raises ValueError unless every size is a positive integer; booleans are refused too."""
    for argument, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{argument} must be a positive integer, got {argument}={size!r}")


def count(shapes: Shapes) -> int:
    """The number of parameters of one example."""
    return sum(math.prod(shape) for shape in shapes.values())


def unpack(shapes: Shapes, flat: Float[Array, "*batch num_params"]) -> Params:
    """Cuts a flat vector into named arrays, in the order of `shapes`.

    Args:
        shapes: name -> shape for one example.
        flat: ``[*batch, count(shapes)]``.

    Returns:
        name -> ``[*batch, *shape]``.
    """
    batch = flat.shape[:-1]
    params, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        params[name] = flat[..., start:stop].reshape(batch + shape)
        start = stop
    return params


def pack(shapes: Shapes, params: Params) -> Float[Array, " num_params"]:
    """Joins the arrays of one example into a flat vector: the inverse of `unpack`, unbatched."""
    return jnp.concatenate([params[name].ravel() for name in shapes])
