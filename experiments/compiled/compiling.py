"""Compiles what a run executes, for devices that are not there."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.compiled.hlo import Program
from svae_jax import config as configs
from svae_jax.devices import sharding
from svae_jax.evaluation import per_image, steps
from svae_jax.recipe import Recipe
from svae_jax.training import feed, step
from svae_jax.training.metrics import TrainMetrics


class Compiled:
    """A program compiled for the devices of a mesh; all figures are those of one device."""

    def __init__(self, mesh: Mesh, function: Any, *args: Any):
        """Compiles a function of `jax.jit` for arguments of these shapes."""
        self._lowered, self._num_devices = function.lower(*args), mesh.size
        self._compiled = self._lowered.compile()

    @functools.cached_property
    def program(self) -> Program:
        """The kernels."""
        return Program(self._compiled.as_text())

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by kind; `outputs` are those that do not take an argument's place."""
        stats = self._compiled.memory_analysis()
        return {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        }

    @property
    def flops(self) -> float:
        """FLOPs as XLA counts them before it compiles; of a loop, of one pass."""
        from jax._src.lib import _jax  # jax has no public way for absent devices; tried with 0.10.2

        module = self._lowered.compiler_ir("hlo").as_hlo_module()
        cost = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        return cost["flops"] / self._num_devices


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
    mesh, one = sharding.make_mesh(devices), sharding.make_mesh(devices[:1])
    yield "train_step", train_step(recipe, mesh, num_images if resident else None)
    batch = jax.ShapeDtypeStruct(
        (recipe.batch_size, *recipe.image_shape), jnp.uint8, sharding=sharding.split_batch(mesh)
    )
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    names = per_image.names(recipe.likelihood, in_training=True)
    evaluate = jax.jit(inspect.unwrap(steps.eval_step), static_argnums=(0, 5))
    known = recipe.model, *_evaluated(recipe, mesh)
    yield "eval_step", Compiled(mesh, evaluate, *known, batch, scale, names)
    generate = jax.jit(inspect.unwrap(steps.generate), static_argnums=(0, 3))
    known = recipe.model, *_evaluated(recipe, one)
    yield "generate", Compiled(one, generate, *known, generation_batch)


def train_step(recipe: Recipe, mesh: Mesh, num_images: int | None) -> Compiled:
    """The train step, in its loop over so many resident images; None: on a streamed batch."""
    everywhere = sharding.replicated(mesh)
    state, metrics = _shapes(lambda: (step.init_state(recipe), TrainMetrics.empty()), mesh)
    count = num_images or recipe.batch_size
    rows = jax.ShapeDtypeStruct(
        feed.rows_shape((count, *recipe.image_shape)),
        jnp.uint8,
        sharding=sharding.replicated_rows(mesh) if num_images else sharding.split_batch(mesh),
    )
    if num_images is None:
        return Compiled(mesh, feed.streamed_update(recipe, mesh), state, metrics, rows)
    order = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=everywhere)
    num_steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    update = feed.resident_update(recipe, mesh)
    return Compiled(mesh, update, state, metrics, rows, order, num_steps)


def _evaluated(recipe: Recipe, mesh: Mesh) -> PyTree:
    """The shapes of the evaluated variables and of a key."""

    def make() -> tuple[PyTree, jax.Array]:
        return step.evaluated_variables(step.init_state(recipe)), jax.random.key(0)

    return _shapes(make, mesh)


def _shapes(make: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """Shapes and dtypes of what a function makes, the same on every device."""
    return jax.jit(make, out_shardings=sharding.replicated(mesh)).eval_shape()
