"""The training loop."""

import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from svae_jax import config as configs
from svae_jax import data, evaluate, feed, images, networks, sharding, step, workdir
from svae_jax.checkpoint import Checkpointer
from svae_jax.errors import UserError
from svae_jax.metrics import TrainMetrics, Writer, truncate
from svae_jax.progress import Progress

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32

Pixels = UInt8[np.ndarray, "n h w c"]


class Job(NamedTuple):
    """What one run is about; none of it changes."""

    config: ml_collections.ConfigDict
    directory: Path
    mesh: Mesh
    recipe: step.Recipe
    train_images: Pixels
    eval_images: Pixels
    num_steps: int


def train(config: ml_collections.ConfigDict, directory: str | Path) -> dict[str, Any]:
    """Train as the configuration says, or go on where an earlier call stopped.

    Args:
        config: see `config.base`.
        directory: the workdir; it is made where it is missing.

    Returns:
        The content of `result.json`: step, held-out metrics, images per second of training,
        numbers of parameters, versions and device.

    Raises:
        UserError: what the user can mend; nothing already saved is lost.
    """
    job = _prepare(config, Path(directory).absolute())
    result = workdir.read_json(job.directory / "result.json")
    if result is not None and result.get("step") == job.num_steps:
        return result
    is_first = jax.process_index() == 0
    with Checkpointer(job.directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        state = _restore_or_init(job, checkpoints)
        begin = int(state.step)
        if is_first:
            truncate(job.directory, begin or -1)
            workdir.write_json(job.directory / "config.json", config.to_dict())
        with (
            Writer(job.directory, enabled=is_first) as writer,
            Progress(job.num_steps, config.batch_size, step=begin, enabled=is_first) as progress,
        ):
            if begin == 0:
                writer.write_config(configs.flatten(config.to_dict()))
            result = _loop(job, state, checkpoints, writer, progress)
    if is_first:
        workdir.write_json(job.directory / "result.json", result)
    return result


def _prepare(config: ml_collections.ConfigDict, directory: Path) -> Job:
    """Everything that can be refused, before anything is compiled."""
    configs.check(config)
    mesh = sharding.make_mesh()
    try:
        sharding.check_batch_size(config.batch_size, mesh)
    except ValueError as error:
        raise UserError(str(error)) from None
    workdir.create(directory)
    earlier = workdir.read_json(directory / "config.json")
    if earlier is not None:
        configs.check_continues(config, configs.from_dict(earlier))
    load = functools.partial(
        data.load,
        config.dataset.name,
        image_size=config.dataset.image_size,
        channels=config.dataset.channels,
        data_dir=config.dataset.data_dir,
        cache_dir=config.dataset.cache_dir,
    )
    train_images, eval_images = load(config.dataset.split), load(config.dataset.eval_split)
    num_steps = configs.num_steps(config, len(train_images))
    if earlier is not None:
        configs.check_duration(config, configs.from_dict(earlier), len(train_images))
    recipe = configs.recipe(config, num_steps)
    return Job(config, directory, mesh, recipe, train_images, eval_images, num_steps)


def _restore_or_init(job: Job, checkpoints: Checkpointer) -> step.TrainState:
    """The state of the newest checkpoint, or that before the first update."""
    everywhere = sharding.replicated(job.mesh)
    init = jax.jit(functools.partial(step.init_state, job.recipe), out_shardings=everywhere)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(init),
    )
    restored = checkpoints.restore(target, config=configs.identity(job.config))
    return init() if restored is None else restored[1]


def _loop(
    job: Job,
    state: step.TrainState,
    checkpoints: Checkpointer,
    writer: Writer,
    progress: Progress,
) -> dict[str, Any]:
    """Train to the last step; log, evaluate, sample and save on the way."""
    config = job.config
    run = feed.make(job.recipe, job.train_images, job.mesh, config.dataset.resident_share)
    at = begin = int(state.step)
    totals = TrainMetrics.empty()
    evaluation: dict[str, float] | None = None
    rates: list[float] = []
    for stop in _stops(job, begin):
        state, totals = run(state, totals, at, stop - at)
        at = stop
        if at == begin + 1:
            jax.block_until_ready(state)  # compiled: from here on, time is training
            progress.start(at)
        due = functools.partial(_is_due, job, at)
        if due(config.log_every):
            scalars = {f"train/{name}": float(x) for name, x in totals.compute().items()}
            totals = TrainMetrics.empty()
            rate = progress.train(at, scalars)
            if not np.isfinite(scalars["train/loss"]):
                raise UserError(f"the loss is {scalars['train/loss']} at step {at}")
            if rate is not None:
                rates.append(rate)
                scalars["images_per_second"] = rate
            writer.write_scalars(at, scalars)
        with progress.paused():
            variables = step.evaluated_variables(state)
            if due(config.eval_every):
                evaluation = _evaluate(job, variables, last=at == job.num_steps)
                progress.evaluation(at, evaluation)
                writer.write_scalars(at, evaluation)
            if due(config.sample_every):
                writer.write_images(at, _pictures(job, variables))
            if due(config.checkpoint.every):
                writer.flush()  # what a checkpoint is not to outlive
                scores = evaluation if due(config.eval_every) else None
                checkpoints.save(at, state, config=configs.identity(config), metrics=scores)
    if evaluation is None:  # the run had been stopped between its last checkpoint and its result
        evaluation = _evaluate(job, step.evaluated_variables(state), last=True)
    return _result(job, state, evaluation, rates)


def _stops(job: Job, begin: int) -> Iterator[int]:
    """The steps past `begin` after which something is to be done."""
    config = job.config
    every = (config.log_every, config.eval_every, config.sample_every, config.checkpoint.every)
    at = begin
    while at < job.num_steps:
        # The first step is a stop, for the clock: it takes the compilation.
        following = at + 1 if at == begin else min((at // n + 1) * n for n in every)
        at = min(following, job.num_steps)
        yield at


def _is_due(job: Job, at: int, every: int) -> bool:
    return at % every == 0 or at == job.num_steps


def _evaluate(job: Job, variables: PyTree, *, last: bool) -> dict[str, float]:
    """Held-out metrics, by their names in metrics.jsonl; the last time with what was asked for."""
    sigma = evaluate.fixed_sigma(job.recipe, variables, job.train_images, job.mesh)
    metrics = evaluate.evaluate(job.recipe, variables, job.eval_images, sigma, job.mesh)
    if last and job.config.importance_samples:
        metrics |= evaluate.importance_weighted(
            job.recipe,
            variables,
            job.eval_images,
            sigma,
            job.mesh,
            num_samples=job.config.importance_samples,
        )
    return {f"eval/{name}": value for name, value in metrics.items()}


def _pictures(job: Job, variables: PyTree) -> dict[str, UInt8[np.ndarray, "h w c"]]:
    """Grids of samples from the prior, the same z at every step, and of reconstructions."""
    model, seed = job.recipe.model, job.recipe.seed
    originals = np.asarray(job.eval_images[:_NUM_RECONSTRUCTIONS])
    samples = step.generate(model, variables, step.stream(seed, "prior"), _NUM_SAMPLES)
    reconstructions = step.reconstruct(model, variables, step.stream(seed, "eval"), originals)
    return {
        "samples": images.grid(samples),
        "reconstructions": images.pairs(originals, reconstructions),
    }


def _result(
    job: Job, state: step.TrainState, evaluation: dict[str, float], rates: list[float]
) -> dict[str, Any]:
    device = job.mesh.devices.flat[0]
    libraries = ("svae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "clu")
    return {
        "step": job.num_steps,
        "metrics": evaluation,
        "images_per_second": float(np.median(rates)) if rates else None,
        "parameters": {
            network: networks.num_params(state.params[network])
            for network in ("encoder", "decoder")
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": job.mesh.size,
            "processes": jax.process_count(),
        },
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }
