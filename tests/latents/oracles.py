"""The same distributions computed in NumPy, densely and slowly, and posteriors to try them on."""

from functools import partial

import jax
import numpy as np
import pytest

from svae_jax import latents

# Small, with h ≠ w wherever a posterior allows it, so that no two axes can be confused.
POSTERIORS = {
    "vector": latents.make("vector", height=1, width=1, maps=3),
    "naive": latents.make("naive", height=3, width=2, maps=2),
    "mvn": latents.make("mvn", height=3, width=2, maps=2),
    "lowrank": latents.make("lowrank", height=2, width=3, maps=2),
    "lowrank_rank_2": latents.make("lowrank", height=3, width=2, maps=2, rank=2),
    "mvn_full": latents.make("mvn_full", height=3, width=2, maps=2),
    "mvn_full_one_row": latents.make("mvn_full", height=1, width=3, maps=2),
    "lowrank_full": latents.make("lowrank_full", height=2, width=3, maps=2, rank=2),
}

every_posterior = pytest.mark.parametrize("post", POSTERIORS.values(), ids=POSTERIORS.keys())

# One of each name, for what takes long to compile.
one_of_each_name = pytest.mark.parametrize(
    "post", [POSTERIORS[name] for name in latents.names()], ids=latents.names()
)


def random_flat(post, batch=(), *, seed=0, dtype=np.float64):
    """Numbers such as an encoder might emit, ``[*batch, num_params]``."""
    flat = np.random.default_rng(seed).normal(scale=0.7, size=(*batch, post.num_params))
    return jax.numpy.asarray(flat, dtype)


def random_params(post, batch=(), *, seed=0, dtype=np.float64):
    return post.unpack(random_flat(post, batch, seed=seed, dtype=dtype))


@partial(jax.jit, static_argnums=(0, 1))
def call(post, method, *args):
    """A posterior's method, compiled once for each posterior and shape."""
    return getattr(post, method)(*args)


def numpy_mean(params):
    """M, ``[*batch, h, w, n]``."""
    if "mean" in params:
        return np.asarray(params["mean"])
    return np.einsum("...irn,...jrn->...ijn", np.asarray(params["mu"]), np.asarray(params["nu"]))


def numpy_sides(params, n):
    """Ω ``[h, h]`` and Ψ ``[w, w]`` of map n of one example."""
    return tuple(
        _side(np.asarray(params[f"{side}_log_variance"])[:, n], params.get(f"{side}_lower"), n)
        for side in ("row", "col")
    )


def _side(log_variance, lower, n):
    size = len(log_variance)
    unit = np.eye(size)
    if lower is not None:
        entries = iter(np.asarray(lower)[:, n])
        for i in range(size):
            for j in range(i):
                unit[i, j] = next(entries)
    return unit @ np.diag(np.exp(log_variance)) @ unit.T


def dense_covariance(params, n):
    """The covariance ``[hw, hw]`` of map n of one example, flattened row-major."""
    if "log_variance" in params:
        return np.diag(np.exp(np.asarray(params["log_variance"])[:, :, n].ravel()))
    return np.kron(*numpy_sides(params, n))


def gaussian_kl(mean, covariance):
    """KL(N(mean, covariance) ‖ N(0, I)) in nats."""
    _, log_det = np.linalg.slogdet(covariance)
    return 0.5 * (np.trace(covariance) + mean @ mean - len(mean) - log_det)


def random_prior_params(prior, *, seed=0):
    """Learned arrays of a prior far from the standard normal, in float64."""
    rng = np.random.default_rng(seed)
    return {
        name: jax.numpy.asarray(rng.normal(scale=0.5, size=shape))
        for name, shape in prior.shapes.items()
    }


def whitening_factors(prior, params):
    """W_space ``[hw, hw]`` and W_maps ``[n, n]`` of a prior."""
    locations = prior.height * prior.width
    if prior.name == "standard":
        return np.eye(locations), np.eye(prior.maps)
    maps = _triangle(params["maps"], prior.maps)
    if prior.name == "matrix_normal":
        return _unit_determinant(_triangle(params["space"], locations)), maps
    rows = _unit_determinant(_triangle(params["rows"], prior.height))
    cols = _unit_determinant(_triangle(params["cols"], prior.width))
    return np.kron(rows, cols), maps


def _triangle(flat, size):
    lower, entries = np.zeros((size, size)), iter(np.asarray(flat))
    for i in range(size):
        for j in range(i + 1):
            lower[i, j] = next(entries)
        lower[i, i] = np.exp(lower[i, i])
    return lower


def _unit_determinant(lower):
    """The same with its diagonal scaled to a determinant of 1."""
    diagonal = np.diag(lower)
    return lower + np.diag(diagonal / np.prod(diagonal) ** (1 / len(lower)) - diagonal)


def autoregressive_whitening(prior, params):
    """V on the diagonal blocks, −Bᵀ where a location meets one of its four neighbours."""
    h, w, n = prior.height, prior.width, prior.maps
    own = np.zeros((n, n))
    entries = iter(np.asarray(params["maps"]))
    for k in range(n):
        for j in range(k + 1):
            own[k, j] = next(entries)
        own[k, k] = np.exp(own[k, k])
    left, upper_left, above, upper_right = np.asarray(params["neighbours"])
    weights = {(0, -1): left, (-1, -1): upper_left, (-1, 0): above, (-1, 1): upper_right}
    whitening = np.zeros((h, w, n, h, w, n))
    for y, x in np.ndindex(h, w):
        whitening[y, x, :, y, x] = own
        for (down, right), weight in weights.items():
            if 0 <= y + down < h and 0 <= x + right < w:
                whitening[y, x, :, y + down, x + right] = -weight.T
    return whitening.reshape(h * w * n, h * w * n)


def dense_prior(prior, params):
    """The mean ``[hwn]`` and the whitening W ``[hwn, hwn]`` of a prior, flattened row-major."""
    if prior.name == "autoregressive":
        whitening = autoregressive_whitening(prior, params)
    else:
        whitening = np.kron(*whitening_factors(prior, params))
    mean = np.asarray(params["mean"]).ravel() if params else np.zeros(len(whitening))
    return mean, whitening


def dense_posterior(post, params):
    """The mean ``[hwn]`` and covariance ``[hwn, hwn]`` of one example, flattened row-major."""
    mean = numpy_mean(params)
    covariance = np.zeros((mean.size, mean.size))
    for n in range(post.maps):
        covariance[n :: post.maps, n :: post.maps] = dense_covariance(params, n)
    return mean.ravel(), covariance
