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
from svae_jax.evaluation import bounds, previews
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
        path = job.directory / "result.json"
        before = files.read_json(path, "remove it, and run the same command again") or {}
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
            files.write_json(path, result)
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
            files.write_json(job.directory / "config.json", config.to_dict())
            files.write_json(job.directory / "data.json", job.record.to_json())
        with (
            Writer(job.directory, enabled=is_first) as writer,
            Progress(job.num_steps, config.batch_size, step=begin, enabled=is_first) as progress,
            interrupt.listening() as request,
        ):
            if begin == 0:
                writer.write_config(configs.flatten(config.to_dict()))
            return _Loop(job, loop_state, checkpoints, writer, progress, request).finish()


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
    restored = checkpoints.restore(
        target,
        config=configs.identity(job.config),
        migrate=lambda saved: configs.identity(configs.from_dict(saved)),
    )
    if restored is not None:
        return restored[1]
    begin = init()
    return begin._replace(state=start.initial(job, begin.state))


class _Loop:
    """The loop of one job: its state, and what is done where it stops."""

    def __init__(
        self,
        job: jobs.Job,
        loop_state: LoopState,
        checkpoints: Checkpointer,
        writer: Writer,
        progress: Progress,
        request: interrupt.Request,
    ):
        self._job, self._config = job, job.config
        self._state, self._totals = loop_state
        self._at = int(self._state.step)  # training steps so far
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._request = request
        self._evaluation: dict[str, float] | None = None  # the last one
        self._evaluated_at: int | None = None
        self._rates: list[float] = []  # images per second
        self._train_steps = feed.make(
            job.recipe, job.train_images, job.mesh, self._config.dataset.resident_share
        )
        self._no_totals = jax.jit(TrainMetrics.empty, out_shardings=sharding.replicated(job.mesh))

    def finish(self) -> dict[str, Any]:
        """Trains to the last step; logs, evaluates, samples and saves along the way."""
        begin, config = self._at, self._config
        for stop in _stops(self._job, begin, self._checkpoints.latest_step() is not None):
            signal = self._train(stop)
            self._check_health()
            if self._at == begin + 1:
                jax.block_until_ready(self._state)  # compilation is over: the clock starts here
                self._progress.start(self._at)
            if self._is_due(config.log_every) and self._at > 0:
                self._log()
            with self._progress.paused():
                variables = step.evaluated_variables(self._state)
                if self._is_due(config.eval_every):
                    self._evaluate(variables)
                if self._is_due(config.sample_every):
                    self._draw(variables)
                if self._is_due(config.checkpoint.every) or signal is not None:
                    self._save()
            if signal is not None and self._at < self._job.num_steps:
                self._checkpoints.wait()
                raise interrupt.Stopped(signal, f"saved at step {self._at}")
        return self._result()

    def _is_due(self, every: int) -> bool:
        return self._at % every == 0 or self._at == self._job.num_steps

    def _train(self, stop: int) -> int | None:
        """Trains up to `stop`; returns the signal that ended it before, if any."""
        signal = None
        # At least one call even after a signal: no step may be logged or saved twice.
        while self._at < stop and signal is None:
            before = self._totals
            self._state, self._totals, made = self._train_steps(
                self._state, self._totals, self._at, stop - self._at
            )
            jax.block_until_ready(before)  # at most one call is in flight
            self._at += made
            self._progress.advance(self._at)
            signal = self._request.agreed()
        return signal

    def _check_health(self) -> None:
        """Stops the run after more than `max_bad_steps` non-finite steps in a row."""
        if failure := step.failure(self._state):
            self._checkpoints.wait()
            latest = self._checkpoints.latest_step()
            raise UserError(f"{failure}. Last good checkpoint: {latest and f'step {latest}'}")

    def _log(self) -> None:
        """Writes the means over the steps since the last log."""
        scalars = {f"train/{name}": float(x) for name, x in self._totals.compute().items()}
        if not self._job.recipe.likelihood.has_scale:
            del scalars["train/sigma"]
        self._totals = self._no_totals()
        rate = self._progress.train(self._at, scalars)
        if rate is not None:
            self._rates.append(rate)
            scalars["images_per_second"] = rate
        self._writer.write_scalars(self._at, scalars)

    def _evaluate(self, variables: PyTree) -> None:
        """Writes and keeps the held-out metrics."""
        self._evaluation, self._evaluated_at = _held_out(self._job, variables), self._at
        self._report(self._evaluation)

    def _report(self, evaluation: dict[str, float]) -> None:
        self._progress.evaluation(self._at, evaluation)
        self._writer.write_scalars(self._at, evaluation)

    def _draw(self, variables: PyTree) -> None:
        """Writes samples and reconstructions."""
        images = (self._job.train_images, self._job.eval_images)
        shown = previews.draw(
            self._job.recipe, variables, *images, self._config.sample_every, self._job.mesh
        )
        self._writer.write_images(self._at, shown)

    def _save(self) -> None:
        """Saves a checkpoint, with the evaluation if there is one of this very step."""
        self._writer.flush()  # metrics reach the disk before the checkpoint does
        self._checkpoints.save(
            self._at,
            LoopState(self._state, self._totals),
            config=self._config.to_dict(),
            metrics=self._evaluation if self._evaluated_at == self._at else None,
        )

    def _result(self) -> dict[str, Any]:
        """The content of `result.json`."""
        variables = step.evaluated_variables(self._state)
        evaluation = self._evaluation
        if evaluation is None:  # killed between the last checkpoint and the result
            evaluation = _held_out(self._job, variables)
        if num_samples := self._config.importance_samples:  # last: it may take long
            scale = bounds.scale_of(self._job.recipe.likelihood, evaluation, "eval/")
            assert scale is not None  # the evaluation holds it
            arguments = (self._job.recipe, variables, self._job.eval_images, scale, self._job.mesh)
            bound = _named(bounds.importance_weighted(*arguments, num_samples=num_samples))
            self._report(bound)
            evaluation = evaluation | bound
        return {
            "metrics": evaluation,
            "images_per_second": float(np.median(self._rates)) if self._rates else None,
            "parameters": models.num_params(self._state.params),
            "device": sharding.describe(self._job.mesh),
            "versions": runtime.versions(),
        }


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


def _held_out(job: jobs.Job, variables: PyTree) -> dict[str, float]:
    """Held-out metrics, by their names in metrics.jsonl."""
    images = (job.train_images, job.eval_images)
    return _named(bounds.held_out(job.recipe, variables, *images, job.mesh))


def _named(values: dict[str, float]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in values.items()}
