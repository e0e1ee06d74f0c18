"""Batch norm, whose kernels on a GPU are few.

For each feature, over the n values x of a batch, with x̂ = (x − mean) / sqrt(variance + ε):

    y = scale · x̂ + bias
    ∂/∂bias = Σ dy        ∂/∂scale = Σ dy · x̂
    ∂/∂x = scale / sqrt(variance + ε) · (dy − Σ dy / n − x̂ · Σ dy · x̂ / n)

(Ioffe and Szegedy 2015). So forward and backward each need one pass that takes two sums, and one
that uses them. From what autodiff writes, XLA makes more passes on a GPU. On a CPU and a TPU it
does not, and there the gradient is autodiff's.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Features = Float[Array, " c"]
Batch = Float[Array, "*b c"]


def normalize(
    x: Batch, mean: Features, variance: Features, scale: Features, bias: Features, epsilon: float
) -> Batch:
    """(x − mean) · scale / sqrt(variance + ε) + bias."""
    return (x - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: Batch, scale: Features, bias: Features, epsilon: float
) -> tuple[Batch, Features, Features]:
    """The batch, normalised in float32 or above, and its mean and variance by feature.

    Gradients flow through the normalised batch alone.
    """

    def on_gpu(x, scale, bias):
        return _normalized(x, scale, bias, epsilon, _sums_at_once)

    def elsewhere(x, scale, bias):
        return _normalized(x, scale, bias, epsilon, _sums)

    return lax.platform_dependent(x, scale, bias, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def _normalized(x, scale, bias, epsilon, sums):
    x = _widened(x)
    mean, mean_square = (total / _count(x) for total in sums(x, jnp.square(x)))
    variance = jnp.maximum(0.0, mean_square - jnp.square(mean))
    return normalize(x, mean, variance, scale, bias, epsilon), mean, variance


def _forward(x, scale, bias, epsilon):
    results = batch_norm(x, scale, bias, epsilon)
    return results, (x, scale, bias, *results[1:])


def _backward(epsilon, residuals, cotangents):
    dy = cotangents[0]

    def on_gpu(x, scale, bias, mean, variance, dy):
        inverse = lax.rsqrt(variance + epsilon)
        centred = (_widened(x) - mean) * inverse
        dbias, dscale = _sums_at_once(dy, dy * centred)
        dx = scale * inverse * (dy - dbias / _count(x) - centred * (dscale / _count(x)))
        return dx.astype(x.dtype), dscale, dbias

    def elsewhere(x, scale, bias, mean, variance, dy):
        # XLA finds that the forward pass has computed all this before.
        def function(x, scale, bias):
            return _normalized(x, scale, bias, epsilon, _sums)[0]

        return jax.vjp(function, x, scale, bias)[1](dy)

    return lax.platform_dependent(*residuals, dy, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


batch_norm.defvjp(_forward, _backward)


def _widened(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _count(x) -> int:
    return math.prod(x.shape[:-1])


def _axes(x) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _sums(x, y):
    """Sums of x and of y over all axes but the last."""
    return jnp.sum(x, axis=_axes(x)), jnp.sum(y, axis=_axes(y))


def _sums_at_once(x, y):
    """The same as one reduction of pairs, which stays one where XLA splits it in two stages."""
    zero = jnp.zeros((), x.dtype)
    return lax.reduce((x, y), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), _axes(x))
