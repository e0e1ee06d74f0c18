"""Many training steps, fed from images on the device or streamed from the host.

Which images a step sees is a pure function of the seed and the step (`step.epoch_permutation`), in
both ways the same.
"""

import collections
import functools
import os
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from svae_jax import sharding, step
from svae_jax.metrics import TrainMetrics
from svae_jax.step import Recipe, TrainState

Images = UInt8[np.ndarray, "n h w c"]

# (state, metrics, the step the state is at, number of steps to make) -> (state, metrics). Both are
# donated.
Run = Callable[[TrainState, TrainMetrics, int, int], tuple[TrainState, TrainMetrics]]

_PREFETCH = 2  # batches under way to the device

# Where XLA runs the kernel gradient of a convolution 50 times slower inside a loop.
_LOOPLESS = ("cpu",)


def make(recipe: Recipe, images: Images, mesh: Mesh, resident_share: float) -> Run:
    """The function that trains on these images, which are resident where they fit the share."""
    if images.nbytes <= resident_share * _device_memory(mesh):
        return _resident(recipe, images, mesh)
    return _streamed(recipe, images, mesh)


def _device_memory(mesh: Mesh) -> int:
    """Bytes of memory of one device: of its own, or of the host."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _update(
    recipe: Recipe, state: TrainState, metrics: TrainMetrics, pixels: UInt8[Array, "b h w c"]
) -> tuple[TrainState, TrainMetrics]:
    state, scalars = step.train_step(recipe, state, pixels)
    return state, metrics.merge(TrainMetrics.single_from_model_output(**scalars))


def _permutation(recipe: Recipe, mesh: Mesh, num_images: int) -> Callable[[int], Int[Array, " n"]]:
    """The order of an epoch, computed once an epoch."""
    compute = jax.jit(
        lambda epoch: step.epoch_permutation(recipe.seed, epoch, num_images),
        out_shardings=sharding.replicated(mesh),
    )
    return functools.lru_cache(maxsize=1)(compute)


def _resident(recipe: Recipe, images: Images, mesh: Mesh) -> Run:
    on_device = sharding.put(images, sharding.replicated(mesh))
    permutation = _permutation(recipe, mesh, len(images))
    steps_per_epoch = len(images) // recipe.batch_size

    def one(carry, images, order):
        state, metrics = carry
        indices = step.batch_indices(order, state.step, recipe.batch_size)
        # Each device gathers its own part of the batch.
        indices = jax.lax.with_sharding_constraint(indices, sharding.split_batch(mesh))
        return _update(recipe, state, metrics, images[indices])

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=sharding.replicated(mesh))
    def many(state, metrics, images, order, num_steps):
        return jax.lax.fori_loop(
            0, num_steps, lambda _, carry: one(carry, images, order), (state, metrics)
        )

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=sharding.replicated(mesh))
    def single(state, metrics, images, order):
        return one((state, metrics), images, order)

    loops = mesh.devices.flat[0].platform not in _LOOPLESS

    def run(state, metrics, at, num_steps):
        while num_steps > 0:
            epoch, position = divmod(at, steps_per_epoch)
            chunk = min(num_steps, steps_per_epoch - position) if loops else 1
            if loops:
                state, metrics = many(state, metrics, on_device, permutation(epoch), chunk)
            else:
                state, metrics = single(state, metrics, on_device, permutation(epoch))
            at, num_steps = at + chunk, num_steps - chunk
        return state, metrics

    return run


def _streamed(recipe: Recipe, images: Images, mesh: Mesh) -> Run:
    permutation = _permutation(recipe, mesh, len(images))
    host_order = functools.lru_cache(maxsize=1)(lambda epoch: np.asarray(permutation(epoch)))
    steps_per_epoch = len(images) // recipe.batch_size
    reader = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")

    def load(at: int) -> UInt8[Array, "b h w c"]:
        epoch, position = divmod(at, steps_per_epoch)
        start = position * recipe.batch_size
        chosen = host_order(epoch)[start : start + recipe.batch_size]
        return sharding.put_rows(images, chosen, mesh)

    def batches(at: int, num_steps: int) -> Iterator[UInt8[Array, "b h w c"]]:
        pending: collections.deque[futures.Future] = collections.deque()
        for ahead in range(at, at + num_steps):
            pending.append(reader.submit(load, ahead))
            if len(pending) > _PREFETCH:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    update = jax.jit(
        functools.partial(_update, recipe),
        donate_argnums=(0, 1),
        out_shardings=sharding.replicated(mesh),
    )

    def run(state, metrics, at, num_steps):
        for pixels in batches(at, num_steps):
            state, metrics = update(state, metrics, pixels)
        return state, metrics

    return run
