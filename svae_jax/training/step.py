"""The training state, and the pure function that makes one update of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from svae_jax.model import init as init_model
from svae_jax.model import objective as objectives
from svae_jax.model import pixels as pixel_ops
from svae_jax.recipe import Recipe, stream


class Health(NamedTuple):
    """How training fares; a step that is not finite changes no parameter.

    Attributes:
        bad_in_a_row: bad steps since the last good one.
        failed_at: the number of steps before the one with which these were too many, and from
            which on nothing changes any more; -1 while all is well.
        failed_term: what was not finite then, as an index into `TERMS`.
    """

    bad_in_a_row: Int[Array, ""]
    failed_at: Int[Array, ""]
    failed_term: Int[Array, ""]


TERMS = ("reconstruction", "kl", "loss", "gradient", "batch statistics")


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
        step: number of steps made.
        params: the model's parameters, float32.
        batch_stats: batch norm's running statistics; empty without batch norm.
        opt_state: the optimizer's state.
        ema: moving averages of `params` and `batch_stats` under these names; None where off.
        health: whether steps were finite.
    """

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None
    health: Health


def init_state(recipe: Recipe) -> TrainState:
    """The state before the first update, from the recipe's seed."""
    variables = init_model(recipe.model, stream(recipe.seed, "init"), *recipe.image_shape[1:])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=recipe.optimizer.init(variables["params"]),
        # Copies: the state is donated, and a buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, variables) if recipe.ema_decay else None,
        health=Health(jnp.int32(0), jnp.int32(-1), jnp.int32(0)),
    )


def evaluated_variables(state: TrainState) -> PyTree:
    """The variables to evaluate and sample with: the moving averages where there are any."""
    if state.ema is not None:
        return state.ema
    return {"params": state.params, "batch_stats": state.batch_stats}


def train_step(
    recipe: Recipe, state: TrainState, pixels: UInt8[Array, "b h w c"]
) -> tuple[TrainState, dict[str, Array]]:
    """One update from one batch.

    A step whose loss, gradient or batch statistics are not finite is left out: it counts, and
    changes nothing else but the state's health.

    Returns:
        The new state, and arrays [1] by name: those of `objectives.TrainingLoss`, `skipped` (1
        where the step was left out) and the `mask` that leaves it out of averages.
    """
    images = pixel_ops.to_float(pixels)
    key = jax.random.fold_in(stream(recipe.seed, "latent"), state.step)

    def loss_fn(params: PyTree) -> tuple[Float[Array, ""], tuple]:
        outputs, updated = recipe.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            key,
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = objectives.training_loss(
            recipe.objective,
            state.step,
            images,
            outputs.means,
            recipe.model.posterior.kl_per_map(outputs.params),
            num_latents=recipe.model.num_latents,
            log_sigma=params.get("log_sigma"),
        )
        return losses.loss, (losses, updated.get("batch_stats", {}))

    gradients, (losses, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Judged before the update: then XLA leaves a bad step out within the update's own pass over
    # the parameters. Squares that sum to a finite number also keep Adam's moments finite, and with
    # them its updates, which are a few learning rates long at most.
    norms = (optax.tree.norm(gradients), optax.tree.norm(batch_stats))
    terms = (losses.reconstruction, losses.kl, losses.loss, *norms)
    health, good = _judge(recipe, state, jnp.isfinite(jnp.stack(terms)))
    updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = _moving_average(
            recipe.ema_decay, state.step, ema, {"params": params, "batch_stats": batch_stats}
        )
    updated = TrainState(state.step + 1, params, batch_stats, opt_state, ema, health)
    kept = state._replace(step=state.step + 1, health=health)
    scalars = {**losses._asdict(), "skipped": 1.0 - good, "mask": good}
    return (
        jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, kept),
        {name: value[None] for name, value in scalars.items()},
    )


def _judge(
    recipe: Recipe, state: TrainState, finite: Bool[Array, " terms"]
) -> tuple[Health, Bool[Array, ""]]:
    """The new health, and whether the step may be taken."""
    before = state.health
    bad_in_a_row = jnp.where(jnp.all(finite), 0, before.bad_in_a_row + 1)
    fails = (before.failed_at < 0) & (bad_in_a_row > recipe.max_bad_steps)
    health = Health(
        bad_in_a_row=bad_in_a_row,
        failed_at=jnp.where(fails, state.step, before.failed_at),
        failed_term=jnp.where(fails, jnp.argmin(finite), before.failed_term).astype(jnp.int32),
    )
    return health, jnp.all(finite) & (health.failed_at < 0)


def failure(state: TrainState) -> str | None:
    """What ended training, if it has come to that."""
    health = jax.device_get(state.health)
    if health.failed_at < 0:
        return None
    return f"the {TERMS[health.failed_term]} was not finite in step {health.failed_at + 1}"


def _moving_average(decay: float, step: Int[Array, ""], average: PyTree, new: PyTree) -> PyTree:
    # A young average forgets faster, lest it carry the random initialisation along.
    weight = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(new, average, weight)


def epoch_permutation(seed: int, epoch: Int[Array, ""] | int, num_images: int) -> Int[Array, " n"]:
    """The order in which an epoch visits the images: a pure function of seed and epoch."""
    return jax.random.permutation(jax.random.fold_in(stream(seed, "data"), epoch), num_images)


def batch_indices(
    permutation: Int[Array, " n"], step: Int[Array, ""], batch_size: int
) -> Int[Array, " b"]:
    """The images of an update, from its epoch's order; the epoch's remainder is dropped."""
    steps_per_epoch = permutation.shape[0] // batch_size
    start = step % steps_per_epoch * batch_size
    return jax.lax.dynamic_slice(permutation, (start,), (batch_size,))
