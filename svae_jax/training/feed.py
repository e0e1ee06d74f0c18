"""Feeds images to training steps, from an array on the device or streamed from the host.

Both give a step the same images: they are a pure function of the seed and the step
(`step.epoch_permutation`).
"""

import collections
import functools
import math
import os
from collections.abc import Callable
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Num

from svae_jax.data import cache
from svae_jax.devices import compiler, sharding
from svae_jax.recipe import Recipe
from svae_jax.training import flat, step
from svae_jax.training.metrics import TrainMetrics
from svae_jax.training.step import TrainState

Images = Num[np.ndarray, "n h w c"]
# Images wait on the device as rows of pixels. A TPU keeps `[n, h, w, c]` in another order than
# gathering wants, so each call would copy the whole data set.
Rows = Num[Array, "n pixels"]

# (state, metrics, step of the state, most steps to make) -> (state, metrics, steps made).
# The state is donated.
Feed = Callable[[TrainState, TrainMetrics, int, int], tuple[TrainState, TrainMetrics, int]]

_PREFETCH = 2  # batches on their way to the device

# Platforms on which XLA runs a convolution's kernel gradient 50 times slower inside a loop.
_LOOPLESS = ("cpu",)

# Arrays of at most so many values are packed into one vector while a loop trains, which saves
# launches of kernels. To copy larger ones takes longer than a launch; on a TPU, slices are also
# worse operands of a convolution.
_LARGE = 2**20
_FLAT = {"tpu": 2**10}


def make(recipe: Recipe, images: Images, mesh: Mesh, resident_share: float) -> Feed:
    """The feed for these images: resident if they fit `resident_share` of a device's memory."""
    make = _resident if is_resident(images, mesh, resident_share) else _streamed
    return make(recipe, images, mesh)


def is_resident(images: Images, mesh: Mesh, resident_share: float) -> bool:
    """Whether the images live on every device."""
    return images.nbytes <= resident_share * _device_memory(mesh)


def _device_memory(mesh: Mesh) -> int:
    """Memory of one device in bytes; on CPU, its share of the host's memory."""
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    stats = devices[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit") or host // len(devices)


def _update(
    recipe: Recipe, state: TrainState, metrics: TrainMetrics, batch: Rows
) -> tuple[TrainState, TrainMetrics]:
    pixels = batch.reshape(len(batch), *recipe.image_shape)
    state, scalars = step.train_step(recipe, state, pixels)
    return state, metrics.merge(TrainMetrics.single_from_model_output(**scalars))


def _jit(update: Callable, mesh: Mesh) -> Callable:
    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler.options(_platform(mesh)),
    )


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _permutation(recipe: Recipe, mesh: Mesh, num_images: int) -> Callable[[int], Int[Array, " n"]]:
    """A function that gives an epoch's order, computed once an epoch."""
    compute = jax.jit(
        lambda epoch: step.epoch_permutation(recipe.seed, epoch, num_images),
        out_shardings=sharding.replicated(mesh),
    )
    return functools.lru_cache(maxsize=1)(compute)


def resident_update(recipe: Recipe, mesh: Mesh) -> Callable:
    """The compiled function that makes steps on resident images.

    It maps (state, metrics, images as rows, the epoch's order, number of steps) to the new state
    and metrics, and donates the state. On a platform without loops it makes one step.
    """

    def one(state, metrics, images, order):
        indices = step.batch_indices(order, state.step, recipe.batch_size)
        # Each device gathers only its own part of the batch.
        indices = jax.lax.with_sharding_constraint(indices, sharding.split_batch(mesh))
        return _update(recipe, state, metrics, images[indices])

    def many(state, metrics, images, order, num_steps):
        if not _loops(mesh):
            return one(state, metrics, images, order)

        at_most = _FLAT.get(_platform(mesh), _LARGE)

        def body(_, carry):
            return flat.flatten(one(*flat.restore(carry), images, order), at_most)

        # Parameters and moments are flat within the step too, all else only from step to step.
        carry = flat.flatten((flat.flatten_parts(state, state.params, at_most), metrics), at_most)
        carry = jax.lax.fori_loop(0, num_steps, body, carry)
        return flat.restore_parts(flat.restore(carry))

    return _jit(many, mesh)


def _loops(mesh: Mesh) -> bool:
    return _platform(mesh) not in _LOOPLESS


def rows_shape(shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """The shape in which images `[n, h, w, c]` go to the device and lie there."""
    return shape[0], math.prod(shape[1:])


def _rows(images: Images) -> Num[np.ndarray, "n pixels"]:
    return images.reshape(rows_shape(images.shape))


def _resident(recipe: Recipe, images: Images, mesh: Mesh) -> Feed:
    on_device = sharding.put(_rows(images), sharding.replicated_rows(mesh))
    permutation = _permutation(recipe, mesh, len(images))
    steps_per_epoch = len(images) // recipe.batch_size
    update = resident_update(recipe, mesh)

    def feed(state, metrics, at, most):
        epoch, position = divmod(at, steps_per_epoch)
        num_steps = min(most, steps_per_epoch - position) if _loops(mesh) else 1
        state, metrics = update(state, metrics, on_device, permutation(epoch), num_steps)
        return state, metrics, num_steps

    return feed


def streamed_update(recipe: Recipe, mesh: Mesh) -> Callable:
    """The compiled function that makes one step on a batch that comes from the host.

    It maps (state, metrics, the batch as rows) to the new state and metrics, and donates the state.
    """
    return _jit(functools.partial(_update, recipe), mesh)


def _streamed(recipe: Recipe, images: Images, mesh: Mesh) -> Feed:
    permutation = _permutation(recipe, mesh, len(images))
    host_order = functools.lru_cache(maxsize=1)(lambda epoch: np.asarray(permutation(epoch)))
    steps_per_epoch = len(images) // recipe.batch_size
    reader = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
    pending: collections.deque[tuple[int, futures.Future]] = collections.deque()

    def load(at: int) -> Rows:
        epoch, position = divmod(at, steps_per_epoch)
        start = position * recipe.batch_size
        chosen = host_order(epoch)[start : start + recipe.batch_size]
        batch = sharding.put_rows(_rows(images), chosen, mesh)
        cache.release(images)  # otherwise a whole epoch's images would stay in memory
        return batch

    def batch(at: int) -> Rows:
        if pending and pending[0][0] != at:
            pending.clear()
        for ahead in range(at + len(pending), at + _PREFETCH + 1):
            pending.append((ahead, reader.submit(load, ahead)))
        return pending.popleft()[1].result()

    update = streamed_update(recipe, mesh)

    def feed(state, metrics, at, most):
        del most
        return *update(state, metrics, batch(at)), 1

    return feed
