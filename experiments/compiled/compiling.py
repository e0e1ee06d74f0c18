"""Compiles what a run executes, for devices that are not there."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from experiments.compiled.hlo import Program
from svae_jax import config as configs
from svae_jax.devices import sharding
from svae_jax.evaluation import per_image, steps
from svae_jax.recipe import Recipe
from svae_jax.training import feed, step
from svae_jax.training.metrics import TrainMetrics


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
        program: its operations.
        memory: bytes on each device: `arguments`, `temporaries`, `outputs` (without those that
            take an argument's place) and `code`.
    """

    program: Program
    memory: dict[str, int]


def compile_all(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    *,
    num_images: int,
    resident: bool,
    generation_batch: int,
) -> Iterator[tuple[str, Compiled]]:
    """Compiles the train step as the loop runs it, the held-out step, and generation.

    Args:
        config: the configuration; its batch size is that of all devices together.
        devices: the devices to compile for.
        num_images: size of the training split.
        resident: whether the images are on the devices, or streamed from the host.
        generation_batch: images generated at a time, on one device.
    """
    recipe = configs.recipe(config, configs.num_steps(config, num_images))
    mesh = sharding.make_mesh(devices)
    yield "train_step", train_step(recipe, mesh, num_images if resident else None)
    state = jax.eval_shape(lambda: step.init_state(recipe))
    variables = jax.eval_shape(step.evaluated_variables, state)
    yield "eval_step", _eval_step(recipe, variables, mesh)
    one = sharding.make_mesh(devices[:1])
    yield "generate", _generate(recipe, variables, one, generation_batch)


def train_step(recipe: Recipe, mesh: Mesh, num_images: int | None) -> Compiled:
    """The train step, in its loop over so many resident images; None: on a streamed batch."""
    everywhere = sharding.replicated(mesh)
    state = _placed(jax.eval_shape(lambda: step.init_state(recipe)), everywhere)
    metrics = _placed(jax.eval_shape(TrainMetrics.empty), everywhere)

    def rows(count: int, where: NamedSharding | Format) -> jax.ShapeDtypeStruct:
        shape = feed.rows_shape((count, *recipe.image_shape))
        return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=where)

    if num_images is None:
        batch = rows(recipe.batch_size, sharding.split_batch(mesh))
        return _compile(feed.streamed_update(recipe, mesh), state, metrics, batch)
    order = jax.ShapeDtypeStruct((num_images,), jnp.int32, sharding=everywhere)
    num_steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    images = rows(num_images, sharding.replicated_rows(mesh))
    return _compile(feed.resident_update(recipe, mesh), state, metrics, images, order, num_steps)


def _eval_step(recipe: Recipe, variables: PyTree, mesh: Mesh) -> Compiled:
    everywhere = sharding.replicated(mesh)
    shape = (recipe.batch_size, *recipe.image_shape)
    return _compile(
        jax.jit(inspect.unwrap(steps.eval_step), static_argnums=(0, 5)),
        recipe.model,
        _placed(variables, everywhere),
        _key(everywhere),
        jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding.split_batch(mesh)),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
        per_image.names(recipe.likelihood, in_training=True),
    )


def _generate(recipe: Recipe, variables: PyTree, mesh: Mesh, count: int) -> Compiled:
    everywhere = sharding.replicated(mesh)
    generate = jax.jit(inspect.unwrap(steps.generate), static_argnums=(0, 3))
    placed = _placed(variables, everywhere)
    return _compile(generate, recipe.model, placed, _key(everywhere), count)


def _key(where: NamedSharding) -> jax.ShapeDtypeStruct:
    return _placed(jax.eval_shape(lambda: jax.random.key(0)), where)


def _placed(tree: PyTree, where: NamedSharding) -> PyTree:
    """Shapes and dtypes of arrays, with a place to live."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def _compile(function: Any, *args: Any) -> Compiled:
    compiled = function.lower(*args).compile()
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return Compiled(Program(compiled.as_text()), memory)
