"""The training loop."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import PyTree

from svae_jax import config as configs
from svae_jax import files, identity, sizes, terminal
from svae_jax import model as models
from svae_jax.devices import runtime, sharding
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds, pictures
from svae_jax.model import SpatialVAE
from svae_jax.run import interrupt, workdir
from svae_jax.run.checkpoint import Checkpointer
from svae_jax.run.progress import Progress
from svae_jax.run.writer import Writer, truncate
from svae_jax.training import cost, feed, start, step
from svae_jax.training import job as jobs
from svae_jax.training.metrics import TrainMetrics


class LoopState(NamedTuple):
    """What a checkpoint holds: the training state, and the metrics since the last log."""

    state: step.TrainState
    totals: TrainMetrics


@runtime.own_numerics()
def train(
    config: ml_collections.ConfigDict,
    directory: str | Path,
    model: SpatialVAE | None = None,
    *,
    images: Any = None,
) -> dict[str, Any]:
    """Trains a model, or resumes a run that an earlier call began.

    Args:
        config: see `config.base`.
        directory: the workdir; created if missing.
        model: trained instead of the one that the configuration's `latent` and `model` describe.
        images: arrays (train, test) instead of the data set of the configuration, or arrays by the
            names of their splits: each ``[N, H, W, C]`` or ``[N, H, W]`` of uint8, uint16 or
            floats, in memory or memory-mapped. `dataset.height`, `width` and `channels`
            are those of the arrays, `dataset.value_range` their range.

    Returns:
        The content of `result.json`: step, held-out metrics, images per second of training,
        numbers of parameters, versions and device.

    Raises:
        UserError: a mistake that the user can correct; nothing already saved is lost.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the run has saved.
    """
    job = jobs.prepare(config, files.user_path(directory, "--workdir"), model, images)
    is_first = jax.process_index() == 0
    with workdir.locked(job.directory) if is_first else contextlib.nullcontext():
        jobs.check_same(job)
        before = workdir.read_json(job.directory / "result.json") or {}
        wanted = {"step": job.num_steps, "importance_samples": config.importance_samples}
        if wanted.items() <= before.items():
            if is_first:
                identity.keep_places(job.directory, job.config)
            return before
        if is_first and sizes.AUTO in (config.model.encoder, config.model.decoder):
            terminal.say(cost.summary(job))
        result = {**wanted, **run(job, is_first)}
        if before.get("step") == job.num_steps:  # only the evaluation was repeated
            result["images_per_second"] = before["images_per_second"]
        if is_first:
            workdir.write_json(job.directory / "result.json", result)
    return result


def run(job: jobs.Job, is_first: bool = True) -> dict[str, Any]:
    """Trains a job to its end, from its newest checkpoint if there is one; one process writes."""
    config = job.config
    with Checkpointer(job.directory / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        loop_state = _restore_or_init(job, checkpoints)
        begin = int(loop_state.state.step)
        if is_first:
            # A run of no steps has its checkpoint at step 0.
            truncate(job.directory, begin if checkpoints.latest_step() is not None else -1)
            workdir.write_json(job.directory / "config.json", config.to_dict())
            workdir.write_json(job.directory / "data.json", job.record.to_json())
        with (
            Writer(job.directory, enabled=is_first) as writer,
            Progress(job.num_steps, config.batch_size, step=begin, enabled=is_first) as progress,
            interrupt.listening() as request,
        ):
            if begin == 0:
                writer.write_config(configs.flatten(config.to_dict()))
            return _loop(job, loop_state, checkpoints, writer, progress, request)


def _restore_or_init(job: jobs.Job, checkpoints: Checkpointer) -> LoopState:
    """The newest intact checkpoint, or the state before the first step."""
    everywhere = sharding.replicated(job.mesh)
    init = jax.jit(
        lambda: LoopState(step.init_state(job.recipe), TrainMetrics.empty()),
        out_shardings=everywhere,
    )
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(init),
    )
    identity, defaults = (configs.identity(c) for c in (job.config, configs.from_dict({})))
    restored = checkpoints.restore(
        target, config=identity, defaults=defaults, migrate=configs.migrated
    )
    if restored is not None:
        return restored[1]
    begin = init()
    return begin._replace(state=start.initial(job, begin.state))


def _loop(
    job: jobs.Job,
    loop_state: LoopState,
    checkpoints: Checkpointer,
    writer: Writer,
    progress: Progress,
    request: interrupt.Request,
) -> dict[str, Any]:
    """Trains to the last step; logs, evaluates, samples and saves along the way."""
    config = job.config
    train_steps = feed.make(job.recipe, job.train_images, job.mesh, config.dataset.resident_share)
    no_totals = jax.jit(TrainMetrics.empty, out_shardings=sharding.replicated(job.mesh))
    state, totals = loop_state
    at = begin = int(state.step)
    evaluation: dict[str, float] | None = None
    rates: list[float] = []
    for stop in _stops(job, begin, checkpoints.latest_step() is not None):
        stopped_by = None
        # At least one call even after a signal: no step may be logged or saved twice.
        while at < stop and stopped_by is None:
            before = totals
            state, totals, made = train_steps(state, totals, at, stop - at)
            jax.block_until_ready(before)  # at most one call is in flight
            at += made
            progress.advance(at)
            stopped_by = request.agreed()
        _check_health(state, checkpoints)
        if at == begin + 1:
            jax.block_until_ready(state)  # compilation is over: the clock starts here
            progress.start(at)

        def due(every: int, at: int = at) -> bool:
            return at % every == 0 or at == job.num_steps

        if due(config.log_every) and at > 0:
            scalars = {f"train/{name}": float(x) for name, x in totals.compute().items()}
            if not job.recipe.likelihood.has_scale:
                del scalars["train/sigma"]
            totals = no_totals()
            rate = progress.train(at, scalars)
            if rate is not None:
                rates.append(rate)
                scalars["images_per_second"] = rate
            writer.write_scalars(at, scalars)
        with progress.paused():
            variables = step.evaluated_variables(state)
            if due(config.eval_every):
                evaluation = _evaluate(job, variables)
                progress.evaluation(at, evaluation)
                writer.write_scalars(at, evaluation)
            if due(config.sample_every):
                images = (job.train_images, job.eval_images)
                shown = pictures.draw(job.recipe, variables, *images, config.sample_every, job.mesh)
                writer.write_images(at, shown)
            if due(config.checkpoint.every) or stopped_by is not None:
                writer.flush()  # metrics reach the disk before the checkpoint does
                scores = evaluation if due(config.eval_every) else None
                now = LoopState(state, totals)
                checkpoints.save(at, now, config=config.to_dict(), metrics=scores)
        if stopped_by is not None and at < job.num_steps:
            checkpoints.wait()
            raise interrupt.Stopped(stopped_by, f"saved at step {at}")
    variables = step.evaluated_variables(state)
    if evaluation is None:  # killed between the last checkpoint and the result
        evaluation = _evaluate(job, variables)
    if num_samples := config.importance_samples:  # last: it may take long
        scale = bounds.scale_of(job.recipe.likelihood, evaluation, "eval/")
        assert scale is not None  # the evaluation holds it
        arguments = (job.recipe, variables, job.eval_images, scale, job.mesh)
        bound = _named(bounds.importance_weighted(*arguments, num_samples=num_samples))
        progress.evaluation(at, bound)
        writer.write_scalars(at, bound)
        evaluation |= bound
    return _result(job, state, evaluation, rates)


def _check_health(state: step.TrainState, checkpoints: Checkpointer) -> None:
    """Stops the run after more than `max_bad_steps` non-finite steps in a row."""
    if failure := step.failure(state):
        checkpoints.wait()
        latest = checkpoints.latest_step()
        raise UserError(f"{failure}. Last good checkpoint: {latest and f'step {latest}'}")


def _stops(job: jobs.Job, begin: int, is_saved: bool) -> Iterator[int]:
    """Steps after `begin` at which the loop logs, evaluates, samples or saves."""
    config = job.config
    every = (config.log_every, config.eval_every, config.sample_every, config.checkpoint.every)
    at = begin
    if job.num_steps == 0 and not is_saved:  # a closed form
        yield 0
    while at < job.num_steps:
        # The first step is a stop, for the clock: it takes the compilation.
        following = at + 1 if at == begin else min((at // n + 1) * n for n in every)
        at = min(following, job.num_steps)
        yield at


def _evaluate(job: jobs.Job, variables: PyTree) -> dict[str, float]:
    """Held-out metrics, by their names in metrics.jsonl."""
    images = (job.train_images, job.eval_images)
    return _named(bounds.held_out(job.recipe, variables, *images, job.mesh))


def _named(values: dict[str, float]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in values.items()}


def _result(
    job: jobs.Job, state: step.TrainState, evaluation: dict[str, float], rates: list[float]
) -> dict[str, Any]:
    return {
        "metrics": evaluation,
        "images_per_second": float(np.median(rates)) if rates else None,
        "parameters": models.num_params(state.params),
        "device": sharding.describe(job.mesh),
        "versions": runtime.versions(),
    }
