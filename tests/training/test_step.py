"""The pure steps: randomness, the update, the moving average, one device and four."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax import config as configs
from svae_jax import recipe as recipe_lib
from svae_jax.evaluation import steps
from svae_jax.training import step


@pytest.fixture
def recipe(tiny_config):
    return configs.recipe(tiny_config, num_steps=10)


def _pixels(key=0, count=12):
    return jax.random.randint(jax.random.key(key), (count, 8, 8, 3), 0, 256).astype(jnp.uint8)


def test_streams_are_distinct():
    draws = {
        float(jax.random.uniform(recipe_lib.stream(seed, name)))
        for seed in (0, 1)
        for name in recipe_lib._STREAMS
    }
    assert len(draws) == 2 * len(recipe_lib._STREAMS)


def test_an_epoch_visits_every_image_once_and_epochs_differ():
    orders = [np.asarray(step.epoch_permutation(3, epoch, 50)) for epoch in (0, 1, 0)]
    assert sorted(orders[0]) == list(range(50))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], step.epoch_permutation(4, 0, 50))


def test_batches_cut_an_epoch_and_drop_the_remainder():
    order = jnp.asarray(np.random.default_rng(0).permutation(10))
    batches = [np.asarray(step.batch_indices(order, jnp.asarray(s), 3)) for s in range(6)]
    np.testing.assert_array_equal(np.concatenate(batches[:3]), order[:9])
    np.testing.assert_array_equal(np.concatenate(batches[3:]), order[:9])


def test_a_step_is_deterministic_and_its_noise_depends_on_seed_and_step(recipe):
    state, pixels = step.init_state(recipe), _pixels()

    @functools.partial(jax.jit, static_argnums=0)
    def loss(seed, state):
        return step.train_step(recipe._replace(seed=seed), state, pixels)[1]["loss"][0]

    first, again = (loss(0, state) for _ in range(2))
    assert float(first) == float(again)
    later = loss(0, state._replace(step=state.step + 1))
    other = loss(1, state)
    assert len({float(first), float(later), float(other)}) == 3


def test_training_lowers_the_loss_and_counts(recipe):
    state, pixels = step.init_state(recipe), _pixels()
    update = jax.jit(lambda state: step.train_step(recipe, state, pixels))
    losses = []
    for _ in range(30):
        state, scalars = update(state)
        losses.append(float(scalars["loss"][0]))
    assert int(state.step) == 30
    assert losses[-1] < losses[0] - 10


def test_the_gradient_agrees_with_finite_differences(tiny_config):
    """Along its own direction, through encoder, posterior, decoder and objective."""
    import optax

    tiny_config.model.norm = "group"
    recipe = configs.recipe(tiny_config, 10)._replace(optimizer=optax.sgd(1.0))
    state, pixels = step.init_state(recipe), _pixels()
    update = jax.jit(lambda state: step.train_step(recipe, state, pixels))
    after, _ = update(state)
    gradient = jax.tree.map(jnp.subtract, state.params, after.params)
    norm = optax.tree.norm(gradient)

    def loss(scale):
        moved = jax.tree.map(lambda p, g: p + scale * g / norm, state.params, gradient)
        return float(update(state._replace(params=moved))[1]["loss"][0])

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose(slope, norm, rtol=0.02)


def test_a_learned_sigma_is_trained(tiny_config):
    tiny_config.objective.sigma = "learned"
    recipe = configs.recipe(tiny_config, 10)
    state = step.init_state(recipe)
    after, scalars = jax.jit(step.train_step, static_argnums=0)(recipe, state, _pixels())
    assert float(scalars["sigma"][0]) == 1.0
    assert float(after.params["log_sigma"]) < 0.0  # towards the error, which is below 1


def test_the_moving_average_follows_parameters_and_statistics(tiny_config):
    tiny_config.optimizer.ema_decay = 0.5
    recipe = configs.recipe(tiny_config, 10)
    state = step.init_state(recipe)
    expected = {"params": state.params, "batch_stats": state.batch_stats}
    update = jax.jit(lambda state, pixels: step.train_step(recipe, state, pixels))
    for i in range(8):
        state, _ = update(state, _pixels(i))
        decay = min(0.5, (1 + i) / (10 + i))
        now = {"params": state.params, "batch_stats": state.batch_stats}
        expected = jax.tree.map(lambda e, n, d=decay: d * e + (1 - d) * n, expected, now)
    actual = step.evaluated_variables(state)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6), actual, expected
    )
    assert not np.allclose(
        actual["params"]["encoder"]["Dense_0"]["kernel"],
        state.params["encoder"]["Dense_0"]["kernel"],
    )


def test_without_an_average_the_parameters_themselves_are_evaluated(recipe):
    state = step.init_state(recipe)
    assert state.ema is None
    assert step.evaluated_variables(state)["params"] is state.params


def test_the_importance_weighted_step_exceeds_the_elbo(recipe):
    variables = step.evaluated_variables(step.init_state(recipe))
    args = (recipe.model, variables, jax.random.key(0), _pixels(), 0.5)
    bounds = steps.importance_weighted_step(*args, 50, 10)
    density, discretized = bounds["density"], bounds["discretized"]
    elbo = steps.eval_step(*args, ("elbo", "bits_per_dim"))
    assert np.all(density > elbo["elbo"] - 5)
    assert np.mean(density) > np.mean(elbo["elbo"])
    nats = -elbo["bits_per_dim"] * 192 * np.log(2)
    assert np.mean(discretized) > np.mean(nats)


def test_samples_do_not_depend_on_how_many_are_drawn_beside_them(recipe):
    """Batch norm uses tracked statistics, so an image does not depend on its neighbours."""
    variables = step.evaluated_variables(step.init_state(recipe))
    z = recipe.model.sample_prior(jax.random.key(0), 6)
    together = recipe.model.apply(variables, z, method="decode")
    alone = recipe.model.apply(variables, z[:1], method="decode")
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    images = steps.generate(recipe.model, variables, jax.random.key(0), 6)
    np.testing.assert_allclose(images, together, atol=1e-6)


@pytest.mark.parametrize("name", ["lowrank", "mvn_full"])
def test_all_steps_lower_for_accelerators(tiny_config, name):
    """For platforms that this machine may not have."""
    configs.latent_from_arg(tiny_config, name, d=3, N=4, C=10)
    recipe = configs.recipe(tiny_config, num_steps=10)
    state = jax.eval_shape(lambda: step.init_state(recipe))
    pixels = jax.ShapeDtypeStruct((12, 8, 8, 3), np.uint8)
    key, model = jax.random.key(0), recipe.model

    @jax.jit
    def everything(state, pixels):
        variables = step.evaluated_variables(state)
        return (
            step.train_step(recipe, state, pixels),
            steps.eval_step(model, variables, key, pixels, 0.1, ("elbo", "psnr")),
            steps.importance_weighted_step(model, variables, key, pixels, 0.1, 4, 2),
            steps.generate(model, variables, key, 3),
        )

    program = jax.export.export(everything, platforms=("cuda", "tpu"))(state, pixels)
    shapes = [out.shape for out in program.out_avals]
    assert shapes[-3:] == [(12,), (12,), (3, 8, 8, 3)]
