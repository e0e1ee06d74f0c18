"""What all samplers share: the protocol, a key for every image, and the posteriors' noise."""

import functools
import math
from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float64, Int, Key, PRNGKeyArray, PyTree

from svae_jax.devices import batches, sharding
from svae_jax.devices.batches import Batch
from svae_jax.samplers.aggregate import Posteriors

Keys = Key[Array, " count"]
"""A key for each image."""

Shape = tuple[int, int, int]
"""Height, width and maps of a latent."""

MOST_LATENTS = 8192  # of a sampler that holds a covariance of all latents, or a factor of it

_BATCH = 250  # latents drawn at a time

# Added to the diagonal, as shares of its mean, until the Cholesky factorisation succeeds.
_JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)


@runtime_checkable
class Sampler(Protocol):
    """A distribution of latents; frozen and hashable, its arrays are given to each call.

    A dataclass: its fields other than `shape`, `seed` and `options` are settings of the fit, with
    their defaults. A row in the table of `samplers` gives it a name.

    Attributes:
        options: the fields that do not change the fit, only how samples are drawn or their density
            is computed.
        num_steps: steps of a fit; 1 for a closed form.
    """

    options: ClassVar[tuple[str, ...]]

    @property
    def num_steps(self) -> int:
        """Steps of a fit; 1 for a closed form."""

    @property
    def shape(self) -> Shape:
        """Height, width and maps of a latent."""

    def check_shape(self) -> None:
        """Raises ValueError where there can be no such sampler of latents of this shape."""

    def init(self, posteriors: Posteriors) -> PyTree:
        """The state before the first step, a tree of arrays."""

    def step(self, state: PyTree, posteriors: Posteriors, count: int) -> PyTree:
        """Makes `count` steps of the fit.

        After the last of `num_steps`, `params` of the state are the arrays for `sample`.

        Raises:
            ValueError: the posteriors do not allow it; the message begins with a setting.
        """

    def params(self, state: PyTree) -> PyTree:
        """The arrays for `sample`."""

    def sample(self, params: PyTree, keys: Keys) -> Float[Array, "count h w n"]:
        """Draws one latent for each key, float32.

        Args:
            params: the arrays that fitting gave.
            keys: ``[count]``.
        """


@runtime_checkable
class Density(Protocol):
    """A sampler that knows log p(z), so that it can take the prior's place in a bound.

    Attributes:
        exact: whether `log_prob` is exact; else it is an unbiased estimate, with which the ELBO is
            a bound, and the importance-weighted one is not.
    """

    exact: ClassVar[bool]

    def density(self, params: PyTree) -> PyTree:
        """The arrays for `log_prob`, from those for `sample`; on the host."""

    def log_prob(self, arrays: PyTree, z: Float[Array, "*batch h w n"]) -> Float[Array, "*batch"]:
        """log p(z) in nats, of latents as the posteriors draw them, with their noise."""


def fit(sampler: Sampler, posteriors: Posteriors) -> PyTree:
    """All steps of a fit at once.

    Returns:
        The arrays for `sample`.
    """
    state = sampler.step(sampler.init(posteriors), posteriors, sampler.num_steps)
    return sampler.params(state)


def image_keys(key: PRNGKeyArray, indices: Int[Array | np.ndarray, " count"]) -> Keys:
    """The keys ``[count]`` of the images of these indices: a function of the index alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(indices))


@functools.partial(jax.jit, static_argnums=0)
def _draw(
    sampler: Sampler, params: PyTree, key: PRNGKeyArray, indices: Int[Array, " count"]
) -> Float[Array, "count h w n"]:
    return sampler.sample(params, image_keys(key, indices))


def draw_batches(
    sampler: Sampler,
    params: PyTree,
    key: PRNGKeyArray,
    count: int,
    first: int = 0,
    size: int = _BATCH,
    mesh: Mesh | None = None,
) -> Iterator[Batch]:
    """Draws latents as `draw` does, one batch after the other; its rows stay on the devices.

    Args:
        sampler: its settings.
        params: its arrays.
        key: the root of all latents.
        count: how many.
        first: the index of the first.
        size: of a batch.
        mesh: the devices; by default all of this process.
    """
    mesh = sharding.make_mesh(jax.local_devices()) if mesh is None else mesh
    everywhere = sharding.replicated(mesh)
    params = jax.tree.map(lambda leaf: sharding.put(np.asarray(leaf), everywhere), params)
    for begin in range(first, first + count, size):
        indices = np.arange(begin, min(begin + size, first + count), dtype=np.int32)
        for batch in batches.split(indices, size, mesh):
            z = _draw(sampler, params, key, batch.rows)
            yield batch._replace(begin=begin - first, rows=z)


def draw(
    sampler: Sampler,
    params: PyTree,
    key: PRNGKeyArray,
    count: int,
    first: int = 0,
    mesh: Mesh | None = None,
) -> Float[Array, "{count} h w n"]:
    """Draws latents on all devices, in compiled batches of one size.

    The latent of image i depends on the key and i alone: more of them are the same and more, and
    ``draw(…, 10, first=20)`` gives numbers 20 to 29.

    Args:
        sampler: its settings.
        params: its arrays.
        key: the root of all latents.
        count: how many, at least 1.
        first: the index of the first.
        mesh: the devices; by default all of this process.

    Raises:
        ValueError: count is below 1, or first below 0.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got count={count}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got first={first}")
    # Whole batches at fixed places, so that neighbours do not change an image's rounding either.
    begin = first // _BATCH * _BATCH
    drawn = draw_batches(sampler, params, key, first + count - begin, begin, mesh=mesh)
    z = np.concatenate([sharding.on_host(batch.rows)[: batch.size] for batch in drawn])
    return jnp.asarray(z[first - begin :])


def require(field: str, value: object, holds: bool, allowed: str) -> None:
    """Raises ValueError, naming what is allowed, unless the field's value holds."""
    if not holds:
        raise ValueError(f"{field} must be {allowed}, got {value!r}")


def check_latents(shape: Shape) -> None:
    """Checks that a covariance of all latents can be held.

    Raises:
        ValueError: it cannot; the message names a sampler that needs none.
    """
    if (latents := math.prod(shape)) > MOST_LATENTS:
        raise ValueError(
            f"latents must be at most {MOST_LATENTS:,}, as it holds a covariance of all of them, "
            f"got {latents:,}: take --sampler=kronecker"
        )


@runtime_checkable
class Learned(Protocol):
    """A sampler of many steps, which can be logged."""

    @property
    def batch_size(self) -> int:
        """Images a step."""

    def logged(self, state: PyTree, count: int) -> tuple[dict[str, float], PyTree]:
        """Metrics of the last `count` steps, and the state that counts anew."""


class ClosedForm:
    """A sampler whose fit is one step from nothing."""

    options: ClassVar[tuple[str, ...]] = ()
    num_steps: ClassVar[int] = 1
    exact: ClassVar[bool] = True  # its density, if it has one

    def check_shape(self) -> None:
        """Latents of all shapes are possible."""

    def init(self, posteriors: Posteriors) -> PyTree:
        """Nothing."""
        del posteriors
        return {}

    def step(self, state: PyTree, posteriors: Posteriors, count: int) -> PyTree:
        """The arrays for `sample`."""
        del state, count
        return self.fit(posteriors)

    def fit(self, posteriors: Posteriors) -> PyTree:
        """The arrays for `sample`."""
        raise NotImplementedError

    def params(self, state: PyTree) -> PyTree:
        """The state."""
        return state


def normal_log_prob(white: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """The log density of N(0, I), in nats."""
    return -0.5 * jnp.sum(white**2, axis=-1) - 0.5 * white.shape[-1] * math.log(2 * math.pi)


def normal(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "count ..."]:
    """White noise ``[count, *shape]``, float32, each row from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def cholesky(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """The lower Cholesky factor in float64.

    Where rounding makes the matrix indefinite, the smallest share of 1e-12, 1e-10, 1e-8 and 1e-6 of
    the mean of the diagonal that helps is added to the diagonal.

    Raises:
        ValueError: nothing helps: the matrix is not positive semi-definite, or not finite.
    """
    scale = np.mean(np.diag(covariance))
    if np.isfinite(scale):
        shifted = covariance.copy()
        for jitter in _JITTERS:
            np.fill_diagonal(shifted, np.diag(covariance) + jitter * scale)
            try:
                return np.linalg.cholesky(shifted)
            except np.linalg.LinAlgError:
                continue
    raise ValueError("covariance must be finite and positive semi-definite")


def inverse(factor: Float[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """The inverse of a lower Cholesky factor, in float64: what whitens."""
    return np.linalg.solve(factor.astype(np.float64), np.eye(len(factor)))


def log_det(factor: Float[np.ndarray, "*c d d"]) -> Float64[np.ndarray, "*c"]:
    """The logarithm of the determinant of a lower Cholesky factor, in float64."""
    diagonal = np.diagonal(factor.astype(np.float64), axis1=-2, axis2=-1)
    return np.asarray(np.sum(np.log(diagonal), axis=-1))


def noise_factor(covariances: Float64[np.ndarray, "n hw hw"]) -> Float[np.ndarray, "n hw hw"]:
    """Cholesky factors of the posteriors' mean covariance of each map, float32."""
    return np.stack([cholesky(covariance) for covariance in covariances]).astype(np.float32)


def posterior_noise(
    factor: Float[Array, "n hw hw"], keys: Keys, shape: Shape
) -> Float[Array, "count h w n"]:
    """Noise with the posteriors' mean covariance: what z ~ q(z|x) adds to its mean, on average."""
    h, w, n = shape
    white = normal(keys, (h * w, n))
    coloured = jnp.einsum("nij,bjn->bin", factor, white, precision=jax.lax.Precision.HIGHEST)
    return coloured.reshape(-1, h, w, n)
