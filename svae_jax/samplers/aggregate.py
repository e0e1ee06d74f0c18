"""The aggregate posterior's moments in closed form, from the posteriors of all training images.

With z ~ q(z|x) of mean m(x) and covariance S(x), and x uniform over the training images,

    E[z] = mean of m(x),    Cov[z] = covariance of m(x) + mean of S(x).

Images are encoded in batches on all devices; sums are kept in float64 on the host.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Num, PRNGKeyArray, PyTree

from svae_jax import model as models
from svae_jax.devices import batches as batch_lib
from svae_jax.devices import compiler, sharding
from svae_jax.latents.base import StartsAtNeighbourhoods
from svae_jax.model import SpatialVAE

_BATCH = 200  # images at a time, or fewer large ones

Chosen = Int[np.ndarray, " m"]


class Encoded(NamedTuple):
    """The posteriors of a batch of b images.

    Attributes:
        means: the posteriors' means m(x), flattened, ``[b, h·w·n]``.
        covariance: the sum over the batch of each map's covariance, ``[n, hw, hw]``.
    """

    means: Float32[np.ndarray, "b d"]
    covariance: Float32[np.ndarray, "n hw hw"]


class Moments(NamedTuple):
    """The aggregate posterior's first two moments, in float64.

    Attributes:
        mean: E[z], ``[d]`` with d = h·w·n.
        of_means: the covariance of the posteriors' means, ``[d, d]``.
        of_noise: the mean of the posteriors' covariances, of each map, ``[n, hw, hw]``. The
            posteriors' maps are independent, so entries between maps are zero.
    """

    mean: Float64[np.ndarray, " d"]
    of_means: Float64[np.ndarray, "d d"]
    of_noise: Float64[np.ndarray, "n hw hw"]

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Cov[z] = `of_means` + `of_noise`, over the latents flattened from ``[h, w, n]``."""
        n, hw, _ = self.of_noise.shape
        total = self.of_means.copy()
        blocks = total.reshape(hw, n, hw, n)
        for i in range(n):
            blocks[:, i, :, i] += self.of_noise[i]
        return total


def encode(
    model: SpatialVAE,
    variables: PyTree,
    images: Num[np.ndarray, "num h w c"],
    mesh: Mesh | None = None,
    *,
    chosen: Chosen | None = None,
    mirrored: bool = False,
) -> Iterator[Encoded]:
    """Encodes every image once, in batches.

    Args:
        model: the networks and the posterior.
        variables: the evaluated variables.
        images: at least one.
        mesh: the devices; by default all of this process.
        chosen: indices of the images that are encoded; all by default.
        mirrored: whether each batch is encoded again, flipped left to right.
    """
    for pixels, batch in _pixels(images, mesh, chosen, mirrored):
        found = sharding.on_host(_encode(model, variables, pixels, batch.inside))
        yield Encoded(found[0][: batch.size], found[1])


@functools.partial(compiler.jit, static_argnums=0)
def _encode(
    model: SpatialVAE,
    variables: PyTree,
    pixels: Num[Array, "b h w c"],
    mask: Bool[Array | np.ndarray, " b"],
) -> tuple[Float[Array, "b d"], Float[Array, "n hw hw"]]:
    """The means, flattened, and the masked sum of the covariances."""
    params = models.encode(model, variables, pixels)
    means = model.posterior.mean(params)
    total = model.posterior.total_covariance(params, jnp.asarray(mask, means.dtype))
    return means.reshape(len(means), -1), total


def samples(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    images: Num[np.ndarray, "num h w c"],
    mesh: Mesh | None = None,
    *,
    chosen: Chosen | None = None,
) -> Iterator[Float32[np.ndarray, "b h w n"]]:
    """One sample z ~ q(z|x) of every image, in batches as `encode`; of a key for each batch."""
    for i, batch in enumerate(_batches(images, mesh, chosen)):
        z = _sample(model, variables, jax.random.fold_in(key, i), batch.rows)
        yield sharding.on_host(z)[: batch.size]


@functools.partial(compiler.jit, static_argnums=0)
def _sample(
    model: SpatialVAE,
    variables: PyTree,
    key: PRNGKeyArray,
    pixels: Num[Array, "b h w c"],
) -> Float[Array, "b _h _w n"]:
    params = models.encode(model, variables, pixels)
    return model.posterior.sample(key, params)


def _batches(
    images: Num[np.ndarray, "num h w c"],
    mesh: Mesh | None,
    chosen: Chosen | None,
) -> Iterator[batch_lib.Batch]:
    count = len(images) if chosen is None else len(chosen)
    size = batch_lib.size_for(images.shape[1:], min(_BATCH, count))
    return batch_lib.split(images, size, mesh, chosen)


def _pixels(
    images: Num[np.ndarray, "num h w c"],
    mesh: Mesh | None,
    chosen: Chosen | None,
    mirrored: bool,
) -> Iterator[tuple[Num[Array, "b h w c"], batch_lib.Batch]]:
    """The pixels of each batch, and flipped left to right where that is asked for."""
    for batch in _batches(images, mesh, chosen):
        yield batch.rows, batch
        if mirrored:
            yield batch.rows[:, :, ::-1], batch


def moments(batches: Iterable[Encoded]) -> Moments:
    """Adds up the moments of all batches; holds one batch at a time.

    Batches are joined by their means and scatter matrices (Chan, Golub and LeVeque 1979), so that
    a mean far from zero costs no digits.

    Raises:
        ValueError: there is no batch.
    """
    count, mean, scatter, noise = 0, np.zeros(()), np.zeros(()), np.zeros(())
    for batch in batches:
        means = batch.means.astype(np.float64)
        added = len(means)
        centre = means.mean(axis=0)
        means -= centre
        shift = centre - mean
        weight = count * added / (count + added)
        scatter = scatter + means.T @ means + weight * np.multiply.outer(shift, shift)
        mean = mean + shift * added / (count + added)
        noise = noise + batch.covariance.astype(np.float64)
        count += added
    if count == 0:
        raise ValueError("batches must hold at least one image, got none")
    return Moments(mean, scatter / count, noise / count)


class Neighbourhoods(NamedTuple):
    """What an autoregression over locations needs of the aggregate posterior's moments.

    Attributes:
        mean: E[z], ``[h, w, n]``.
        sums: see `of_neighbourhoods` of the prior `autoregressive`; ``[k, n, k, n]``.
    """

    mean: Float64[np.ndarray, "h w n"]
    sums: Float64[np.ndarray, "k n k n"]


def neighbourhoods(
    model: SpatialVAE,
    variables: PyTree,
    images: Num[np.ndarray, "num h w c"],
    prior: StartsAtNeighbourhoods,
    *,
    chosen: Chosen | None = None,
    mirrored: bool = False,
) -> Neighbourhoods:
    """The moments of neighbouring locations, without the covariance of all latents.

    That has (h·w·n)² entries. Here the posteriors' part takes the prior's weights of each pair of
    neighbours, (h·w)² entries at a time: 134 MB for 64×64 locations.

    Args:
        model: the networks and the posterior.
        variables: the evaluated variables.
        images: at least one.
        prior: an autoregression over locations, which knows the neighbours.
        chosen: as for `encode`.
        mirrored: as for `encode`.
    """
    count, total, squares, noise = 0, np.zeros(()), np.zeros(()), np.zeros(())
    shift: np.ndarray | None = None
    for pixels, batch in _pixels(images, None, chosen, mirrored):
        found = _encode_neighbourhoods(model, prior, variables, pixels, batch.inside)
        means, added = sharding.on_host(found)
        means = means[: batch.size].astype(np.float64)
        # Near the mean, sums of products lose no digits.
        shift = means.mean(axis=0) if shift is None else shift
        count, total, noise = count + len(means), total + (means - shift).sum(0), noise + added
        squares = squares + _gram_of(prior.neighbourhoods(means - shift))
    assert shift is not None  # there is one image at least
    offset = total / count
    sums = squares / count - _gram_of(prior.neighbourhoods(offset))
    n = sums.shape[1]
    sums[:, np.arange(n), :, np.arange(n)] += np.moveaxis(noise / count, -1, 0)
    return Neighbourhoods(shift + offset, sums)


def _gram_of(rows: Float64[np.ndarray, "*b k n"]) -> Float64[np.ndarray, "k n k n"]:
    """The sum over all rows of the products of their entries."""
    k, n = rows.shape[-2:]
    flat = rows.reshape(-1, k * n)
    return (flat.T @ flat).reshape(k, n, k, n)


@functools.partial(compiler.jit, static_argnums=(0, 1))
def _encode_neighbourhoods(
    model: SpatialVAE,
    prior: StartsAtNeighbourhoods,
    variables: PyTree,
    pixels: Num[Array, "b h w c"],
    mask: Bool[Array | np.ndarray, " b"],
) -> tuple[Float[Array, "b _h _w n"], Float[Array, "k k n"]]:
    """The means, and the masked sums of the posteriors' covariances of neighbours."""
    params = models.encode(model, variables, pixels)

    def noise(b: int, c: int) -> Float[Array, " n"]:
        traces = model.posterior.weighted_trace(params, prior.pair_weights(b, c))
        return jnp.sum(jnp.where(mask[:, None], traces, 0), axis=0)

    members = range(prior.num_members)
    sums = jnp.stack([jnp.stack([noise(b, c) for c in members]) for b in members])
    return model.posterior.mean(params), sums


class AxisCovariances(NamedTuple):
    """E[z], and the covariance along each axis, summed over the two others (of each mode).

    Attributes:
        mean: E[z], ``[h, w, n]``.
        rows: Σ over columns and maps of Cov[z_i.., z_j..], ``[h, h]``.
        cols: the same of the columns, ``[w, w]``.
        maps: the same of the maps, ``[n, n]``.
    """

    mean: Float64[np.ndarray, "h w n"]
    rows: Float64[np.ndarray, "h h"]
    cols: Float64[np.ndarray, "w w"]
    maps: Float64[np.ndarray, "n n"]


def axis_covariances(batches: Iterable[Float[np.ndarray, "_b h w n"]]) -> AxisCovariances:
    """Of latents z ~ q(z), summed in float64 on the host.

    Raises:
        ValueError: there is no batch.
    """
    count, total = 0, np.zeros(())
    products: list[np.ndarray] = []
    for batch in batches:
        z = batch.astype(np.float64)
        count, total = count + len(z), total + z.sum(axis=0)
        added = [_gram(z, axis) for axis in (1, 2, 3)]
        products = [a + b for a, b in zip(products, added, strict=True)] if products else added
    if count == 0:
        raise ValueError("batches must hold at least one image, got none")
    mean = total / count
    covariances = (p / count - _gram(mean[None], i + 1) for i, p in enumerate(products))
    return AxisCovariances(mean, *covariances)


def _gram(z: Float64[np.ndarray, "b h w n"], axis: int) -> Float64[np.ndarray, "m m"]:
    flat = np.moveaxis(z, axis, 0).reshape(z.shape[axis], -1)
    return flat @ flat.T


class Posteriors:
    """The posteriors of many images; what a sampler asks for is computed then, and kept.

    Args:
        encode: gives the batches of `encode`, anew at each call.
        sample: gives the batches of `samples`.
    """

    def __init__(
        self,
        encode: Callable[[], Iterable[Encoded]],
        sample: Callable[[], Iterable[Float32[np.ndarray, "_b h w n"]]] = tuple,
    ):
        self._encode, self._sample = encode, sample

    @functools.cached_property
    def _batches(self) -> list[Encoded]:
        return list(self._encode())

    @functools.cached_property
    def means(self) -> Float32[np.ndarray, "num d"]:
        """The means m(x), one row an image."""
        return np.concatenate([batch.means for batch in self._batches])

    @functools.cached_property
    def latents(self) -> Float32[np.ndarray, "num d"]:
        """One sample z ~ q(z|x) of every image, one row an image."""
        return np.concatenate([z.reshape(len(z), -1) for z in self._sample()])

    @functools.cached_property
    def moments(self) -> Moments:
        """The moments; without `means` before, one batch at a time is in memory."""
        is_kept = "_batches" in self.__dict__
        return moments(self._batches if is_kept else self._encode())

    @functools.cached_property
    def axis_covariances(self) -> AxisCovariances:
        """Those of one sample z ~ q(z|x) of every image."""
        return axis_covariances(self._sample())


def posteriors(
    model: SpatialVAE,
    variables: PyTree,
    images: Num[np.ndarray, "num h w c"],
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    *,
    chosen: Chosen | None = None,
) -> Posteriors:
    """The posteriors of these images, or of those chosen; `key` is that of their samples."""
    return Posteriors(
        lambda: encode(model, variables, images, mesh, chosen=chosen),
        lambda: samples(model, variables, key, images, mesh, chosen=chosen),
    )
