"""The flow: what it recovers, its network and its solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax import samplers
from svae_jax.samplers import aggregate, flow, velocity
from tests.samplers.toys import clusters, encoded, of, share_between

SMALL = {
    "width": 32, "depth": 1, "num_params": 15_000, "batch_size": 256, "learning_rate": 3e-3,
    "ema_decay": 0.99, "ode_steps": 10,
}  # fmt: skip


def fit(sampler, posteriors, num_steps=None):
    steps = sampler.num_steps if num_steps is None else num_steps
    return sampler.params(sampler.step(sampler.init(posteriors), posteriors, steps))


def draw(sampler, params, count):
    z = samplers.draw(sampler, params, jax.random.key(0), count)
    return np.asarray(z, np.float64).reshape(count, -1)


def errors_of_moments(points, moments):
    """Of the mean and of the covariance, in units of the entries' standard deviations."""
    scale = np.sqrt(np.diag(moments.of_means))
    mean = (points.mean(axis=0) - moments.mean) / scale
    covariance = (np.cov(points.T) - moments.of_means) / np.outer(scale, scale)
    return np.abs(mean).max(), np.abs(covariance).max()


def test_an_untrained_flow_is_the_gaussian_of_the_means():
    rng = np.random.default_rng(0)
    posteriors = encoded(rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4)) + 2.0)
    sampler = samplers.Flow((2, 2, 1), **SMALL)
    points = draw(sampler, fit(sampler, posteriors, num_steps=0), 4000)
    mean, covariance = errors_of_moments(points, posteriors.moments)
    assert mean < 0.06
    assert covariance < 0.08


def test_a_flow_separates_clusters_and_keeps_their_mean_and_covariance():
    posteriors = encoded(clusters(2000))
    sampler = samplers.Flow((1, 1, 4), num_steps=1000, **SMALL)
    points = draw(sampler, fit(sampler, posteriors), 4000)
    assert share_between(points) < 0.02
    mean, covariance = errors_of_moments(points, posteriors.moments)
    assert mean < 0.05
    assert covariance < 0.05


def test_updates_in_one_call_are_those_in_many():
    posteriors = encoded(clusters(100))
    sampler = samplers.Flow((2, 2, 1), num_steps=5, **SMALL)
    whole = sampler.step(sampler.init(posteriors), posteriors, 5)
    parts = sampler.init(posteriors)
    for count in (1, 3, 1):
        parts = sampler.step(parts, posteriors, count)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert int(whole.state.step) == 5


def test_noise_is_added_to_the_same_means():
    means = clusters(200, d=16)
    covariance = np.broadcast_to(200 * 0.25 * np.eye(4, dtype=np.float32), (4, 4, 4))
    plain = samplers.Flow((2, 2, 4), **SMALL)
    params = fit(plain, of([aggregate.Encoded(means, covariance)]), num_steps=0)
    noisy = samplers.Flow((2, 2, 4), noise=True, **SMALL)
    noise = draw(noisy, params, 2000) - draw(plain, params, 2000)
    np.testing.assert_allclose(np.cov(noise.T), 0.25 * np.eye(16), atol=0.05)


def test_an_untrained_velocity_is_the_best_linear_one():
    """The regression of x₁ − x₀ on x_t, over pairs from one Gaussian, at three times."""
    sampler = samplers.Flow((2, 1, 1), **SMALL)
    params = sampler.init(encoded(clusters(100, d=2))).state.params
    rng = np.random.default_rng(0)
    factor = np.array([[1.0, 0.0], [0.6, 0.8]])
    source, target = rng.normal(size=(2, 200_000, 2)) @ factor.T
    for t in (0.1, 0.5, 0.9):
        x = (1 - t) * source + t * target
        slope, *_ = np.linalg.lstsq(x, target - source)
        velocity = sampler._velocity(params, jnp.eye(2)[..., None], jnp.full(2, t))
        np.testing.assert_allclose(velocity[..., 0], slope, atol=0.02)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((1, 1, 150), (1, 1)), ((3, 3, 128), (1, 1)), ((4, 4, 16), (1, 1)), ((6, 6, 8), (2, 2)),
        ((8, 8, 4), (2, 2)), ((4, 8, 4), (1, 2)), ((5, 12, 2), (1, 4)), ((16, 16, 8), (4, 4)),
        ((7, 7, 2), (1, 7)),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_are_patches_of_cells(shape, patch):
    height, width, maps = shape
    assert velocity.patch(shape) == patch
    cell = np.arange(height * width).reshape(height, width)
    flat = np.stack([np.repeat(cell.ravel(), maps), np.arange(height * width * maps)])
    tokens = velocity.to_patches(jnp.asarray(flat, jnp.float32), shape)
    assert tokens.shape[1] <= velocity.MAX_TOKENS
    np.testing.assert_array_equal(velocity.from_patches(tokens, shape), flat)
    h, w = patch
    expected = [
        cell[i : i + h, j : j + w].ravel() for i in range(0, height, h) for j in range(0, width, w)
    ]
    np.testing.assert_array_equal(tokens[0, :, ::maps], expected)


def test_heun_is_of_second_order():
    """dx/dt = x·cos t, whose solution at 1 is exp(sin 1)."""
    x = jnp.ones((1, 1, 1))
    errors = [
        abs(float(flow.heun(lambda x, t: x * jnp.cos(t), x, steps)[0, 0, 0]) - np.exp(np.sin(1.0)))
        for steps in (4, 8)
    ]
    assert 3.3 < errors[0] / errors[1] < 4.7


@pytest.mark.parametrize(
    "shape", [(1, 1, 81), (1, 1, 150), (3, 3, 64), (3, 3, 128), (8, 8, 32)], ids=str
)
def test_networks_are_of_the_same_size_for_latents_of_all_shapes(shape):
    network = velocity.make(shape, width=192, depth=3, num_params=2_000_000)
    assert velocity.count_params(network) == pytest.approx(2_000_000, rel=0.01)


def test_a_network_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"num_params must be at least \d+ for latents of shape"):
        velocity.make((3, 3, 128), width=192, depth=3, num_params=1000)
