"""The posteriors by name: which mean goes with which covariance."""

import math
from collections.abc import Callable

from svae_jax.latents import base
from svae_jax.latents.base import Covariance, Mean
from svae_jax.latents.covariances import Independent, KroneckerDiagonal, KroneckerFull
from svae_jax.latents.means import NU_STARTS, FreeMean, LowRankMean
from svae_jax.latents.posterior import Posterior

# name -> how the mean and the covariance are built; a new posterior is one more row
_TABLE: dict[str, tuple[Callable[..., Mean], Callable[..., Covariance]]] = {
    "vector": (FreeMean, Independent),
    "naive": (FreeMean, Independent),
    "mvn": (FreeMean, KroneckerDiagonal),
    "lowrank": (LowRankMean, KroneckerDiagonal),
    "mvn_full": (FreeMean, KroneckerFull),
    "lowrank_full": (LowRankMean, KroneckerFull),
}


_VECTORS = ("vector",)  # rows whose maps have one location


def names() -> tuple[str, ...]:
    """The names that `make` takes."""
    return tuple(_TABLE)


def is_vector(name: str) -> bool:
    """Whether the maps of this posterior have one location, so that its latent is a vector."""
    return name in _VECTORS


def has_rank(name: str) -> bool:
    """Whether the mean of this posterior has a rank."""
    return name in _TABLE and _TABLE[name][0] is LowRankMean


def make(
    name: str,
    *,
    height: int,
    width: int,
    maps: int,
    rank: int = 1,
    nu_scale: float = 0.001,
    nu_start: str = "random",
    lower_scale: float = 0.1,
) -> Posterior:
    """The posterior of that name over `maps` maps of `height` × `width`.

    Args:
        name: one of `names()`.
        height: rows h of a map.
        width: columns w of a map.
        maps: the number of maps N; for `vector`, the number of latents C.
        rank: the rank R of the mean, for `lowrank` and `lowrank_full`.
        nu_scale: of `LowRankMean`; other means have no use for it.
        nu_start: likewise.
        lower_scale: of `KroneckerFull`; other covariances have no use for it.

    Raises:
        ValueError: an unknown name or start, a size that is no positive integer, a scale that is
            not above 0, a rank above min(height, width) or given to an unconstrained mean, or a
            `vector` of more than 1×1.
    """
    if name not in _TABLE:
        raise ValueError(f"name must be one of {', '.join(names())}, got name={name!r}")
    base.check_positive(height=height, width=width, maps=maps, rank=rank)
    if is_vector(name) and (height, width) != (1, 1):
        raise ValueError(
            f"height and width must be 1 for {name}, got height={height}, width={width}; its "
            "length is maps"
        )
    for argument, scale in (("nu_scale", nu_scale), ("lower_scale", lower_scale)):
        if not 0 < scale < math.inf:
            raise ValueError(f"{argument} must be above 0, got {argument}={scale}")
    if nu_start not in NU_STARTS:
        raise ValueError(f"nu_start must be one of {', '.join(NU_STARTS)}, got {nu_start!r}")
    make_mean, make_covariance = _TABLE[name]
    is_low_rank = has_rank(name)
    if is_low_rank and rank > min(height, width):
        raise ValueError(
            f"rank must be between 1 and min(height, width) = {min(height, width)}, got rank={rank}"
        )
    if not is_low_rank and rank != 1:
        raise ValueError(f"rank must be 1 for {name}, whose mean is unconstrained, got rank={rank}")
    size = (height, width, maps)
    mean = make_mean(*size, rank, nu_scale, nu_start) if is_low_rank else make_mean(*size)
    is_full = make_covariance is KroneckerFull
    covariance = make_covariance(*size, lower_scale) if is_full else make_covariance(*size)
    return Posterior(name, mean, covariance)
