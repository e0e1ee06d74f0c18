"""The training state, and the pure function that makes one training step."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray, PyTree

from svae_jax.model import init as init_model
from svae_jax.model import objective as objectives
from svae_jax.recipe import Recipe, stream
from svae_jax.training import flat


class Health(NamedTuple):
    """Counts non-finite steps; such a step changes no parameter.

    Attributes:
        bad_in_a_row: non-finite steps since the last finite one.
        failed_at: the step whose failure exceeded `max_bad_steps`, counted from 0; from then on
            nothing changes any more. -1 if training has not failed.
        failed_term: the first non-finite quantity of that step, as an index into `TERMS`.
    """

    bad_in_a_row: Int[Array, ""]
    failed_at: Int[Array, ""]
    failed_term: Int[Array, ""]


TERMS = ("reconstruction", "kl", "loss", "gradient", "batch statistics")


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
        step: number of training steps so far.
        params: the model's parameters, float32.
        batch_stats: batch norm's running statistics; empty without batch norm.
        opt_state: the optimizer's state.
        ema: moving averages of `params` and `batch_stats`, under these names; None if off.
        health: counts of non-finite steps.
    """

    step: Int[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None
    health: Health


def init_state(recipe: Recipe) -> TrainState:
    """The state before the first step; its randomness comes from the recipe's seed."""
    variables = init_model(recipe.model, stream(recipe.seed, "init"), recipe.image_shape)
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
    """The variables for evaluation and sampling: the moving averages if they are on."""
    if state.ema is not None:
        return state.ema
    return {"params": state.params, "batch_stats": state.batch_stats}


def train_step(
    recipe: Recipe, state: TrainState, pixels: Num[Array, "b h w c"]
) -> tuple[TrainState, dict[str, Array]]:
    """One training step on one batch.

    A step whose loss, gradient or batch statistics are not finite is skipped: it increases the step
    and updates the health, and changes nothing else.

    Returns:
        The new state, and arrays [1] by name: those of `objectives.TrainingLoss`, `skipped` (1 if
        the step was skipped, else 0) and `mask` (1 - skipped), which leaves it out of averages.
    """
    images = recipe.likelihood.pixels.to_float(pixels)
    if recipe.flip:
        images = _flip(jax.random.fold_in(stream(recipe.seed, "flip"), state.step), images)
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
            recipe.likelihood,
            state.step,
            images,
            outputs.outputs,
            outputs.kl_per_map,
            num_latents=recipe.model.num_latents,
            log_sigma=params.get("log_sigma"),
        )
        return losses.loss, (losses, updated.get("batch_stats", {}))

    params = flat.restore_parts(state.params)
    gradients, (losses, batch_stats) = jax.grad(loss_fn, has_aux=True)(params)
    gradients = flat.flatten_like(gradients, state.params)
    # Decided before the update, so that XLA skips a bad step within the update's own pass over the
    # parameters. A finite sum of squares also keeps Adam's moments finite, and with them its
    # updates, which are at most a few learning rates long.
    norms = (optax.tree.norm(gradients), optax.tree.norm(batch_stats))
    terms = (losses.reconstruction, losses.kl, losses.loss, *norms)
    health, good = _judge(recipe, state, [jnp.isfinite(term) for term in terms])
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


def _flip(key: PRNGKeyArray, images: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Flips each image left to right with probability ½."""
    chosen = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def _judge(
    recipe: Recipe, state: TrainState, finite: Sequence[Bool[Array, ""]]
) -> tuple[Health, Bool[Array, ""]]:
    """The new health, and whether the step is applied."""
    before = state.health
    all_finite = functools.reduce(jnp.logical_and, finite)  # a reduction would be a kernel more
    first_bad = jnp.int32(0)
    for index in reversed(range(len(finite))):
        first_bad = jnp.where(finite[index], first_bad, index)
    bad_in_a_row = jnp.where(all_finite, 0, before.bad_in_a_row + 1)
    fails = (before.failed_at < 0) & (bad_in_a_row > recipe.max_bad_steps)
    health = Health(
        bad_in_a_row=bad_in_a_row,
        failed_at=jnp.where(fails, state.step, before.failed_at),
        failed_term=jnp.where(fails, first_bad, before.failed_term),
    )
    return health, all_finite & (health.failed_at < 0)


def failure(state: TrainState) -> str | None:
    """The sentence that says why training failed; None if it has not."""
    health = jax.device_get(state.health)
    if health.failed_at < 0:
        return None
    return (
        f"the {TERMS[health.failed_term]} was not finite in step {health.failed_at + 1}; lower "
        "optimizer.learning_rate, set optimizer.clip_norm, or allow optimizer.max_bad_steps"
    )


def _moving_average(decay: float, step: Int[Array, ""], average: PyTree, new: PyTree) -> PyTree:
    # The decay grows from 0.1, so that the average forgets the random initialisation.
    weight = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(new, average, weight)


def epoch_permutation(seed: int, epoch: Int[Array, ""] | int, num_images: int) -> Int[Array, " n"]:
    """The order in which an epoch visits the images: a pure function of the seed and the epoch."""
    return jax.random.permutation(jax.random.fold_in(stream(seed, "data"), epoch), num_images)


def batch_indices(
    permutation: Int[Array, " n"], step: Int[Array, ""], batch_size: int
) -> Int[Array, " b"]:
    """Indices of a step's images in its epoch's order; an epoch's remainder is dropped."""
    steps_per_epoch = permutation.shape[0] // batch_size
    start = step % steps_per_epoch * batch_size
    return jax.lax.dynamic_slice(permutation, (start,), (batch_size,))
