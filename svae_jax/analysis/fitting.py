"""Fits a sampler to the model of a workdir; resumable, as training is."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm
from jaxtyping import PyTree

from svae_jax import sampler_config, samplers
from svae_jax.analysis import fitted, trained
from svae_jax.errors import UserError
from svae_jax.run import checkpoint, interrupt, workdir
from svae_jax.run.checkpoint import Checkpointer
from svae_jax.run.progress import Progress
from svae_jax.samplers import aggregate, flow, kronecker

_KEEP = 2  # checkpoints: the newest, and the one before it in case that one is damaged


class Job(NamedTuple):
    """Everything a fit needs that stays fixed."""

    name: str
    config: ml_collections.ConfigDict
    folder: Path
    trained: trained.Trained
    sampler: Any
    identity: dict[str, Any]


def fit(
    directory: str | Path, name: str, config: ml_collections.ConfigDict, *, images: Any = None
) -> dict[str, Any]:
    """Fits a sampler to the newest checkpoint of a run, or resumes a fit that was interrupted.

    The training images are encoded anew; the run may still be training, as its checkpoint is only
    read. A sampler of an older checkpoint is replaced.

    Args:
        directory: the workdir.
        name: one of `samplers.names()`, other than `prior`.
        config: see `sampler_config.base`.
        images: the arrays that the run is of, if it is of arrays from Python.

    Returns:
        `sampler`, the model's `step` and `fingerprint`, the fit's `num_steps`, and `parameters`,
        how many numbers the sampler holds.

    Raises:
        UserError: a mistake that the user can correct.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the fit has saved.
    """
    directory = Path(directory).absolute()
    if name == "prior":
        raise UserError("--sampler=prior needs no fit: it is the model's own")
    if name in samplers.names():
        sampler_config.check(config, name)
    model = trained.load(directory, images=images)
    sampler = sampler_config.make(config, name, fitted.shape(model))
    identity: dict[str, Any] = {
        "sampler": name,
        "model": fitted.model_identity(model),
        "settings": sampler_config.identity(config, name),
    }
    folder = fitted.place(directory, name)
    workdir.create(folder)
    job = Job(name, config, folder, model, sampler, identity)
    with workdir.locked(folder):
        params = _finished(job)
        if params is None:
            with Checkpointer(folder / "checkpoints", keep=_KEEP) as checkpoints:
                params = _fit_flow(job, checkpoints) if name == "flow" else _fit_at_once(job)
                checkpoints.save(_num_steps(job), {"params": params}, config=identity)
    return {
        "sampler": name,
        **identity["model"],
        "num_steps": _num_steps(job),
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
    }


def _finished(job: Job) -> PyTree | None:
    """The arrays of a finished fit; removes one of another model, and refuses other settings."""
    folder = job.folder / "checkpoints"
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        return None
    try:
        loaded = checkpoint.load(folder)
    except UserError as error:
        raise UserError(f"{error}; or delete {job.folder} to fit it anew") from None
    if loaded.config["model"] != job.identity["model"]:
        print(
            f"the sampler {job.name} of step {loaded.config['model']['step']} is replaced by one "
            f"of step {job.trained.step}",
            file=sys.stderr,
        )
        shutil.rmtree(folder)
        return None
    ours, theirs = job.identity["settings"], loaded.config["settings"]
    changed = [f"{k}={ours[k]!r} (was {theirs.get(k)!r})" for k in ours if ours[k] != theirs.get(k)]
    if changed:
        raise UserError(
            f"{job.folder} was fitted with other settings: {', '.join(changed)}; set them back, or "
            "delete that directory to fit it anew"
        )
    return loaded.state.get("params")


def _num_steps(job: Job) -> int:
    return job.config.flow.num_steps if job.name == "flow" else 1


def _encode(job: Job) -> Iterator[aggregate.Encoded]:
    """The posteriors of all training images, with a progress bar on a terminal."""
    images = job.trained.images(job.trained.config.dataset.split)
    print(f"encoding {len(images):,} training images", file=sys.stderr, flush=True)
    with tqdm.tqdm(total=len(images), unit=" images", disable=None) as bar:
        for batch in aggregate.encode(job.trained.model, job.trained.variables, images):
            yield batch
            bar.update(len(batch.means))


def _samples(job: Job) -> Iterator[np.ndarray]:
    """A latent of every training image."""
    model, variables, config, _ = job.trained
    images = job.trained.images(config.dataset.split)
    print(f"encoding {len(images):,} training images", file=sys.stderr, flush=True)
    key = jax.random.key(job.config.seed)
    return aggregate.samples(model, variables, key, images)


def _fit_at_once(job: Job) -> PyTree:
    if job.name == "kronecker":
        return job.sampler.fit(kronecker.modes(_samples(job)))
    if job.name == "gaussian":
        return job.sampler.fit(aggregate.moments(_encode(job)))
    batches = list(_encode(job))
    try:
        return job.sampler.fit(aggregate.means(batches), aggregate.moments(batches))
    except ValueError as error:
        raise UserError(f"{job.name}.{error}") from None


class _LoopState(NamedTuple):
    """What a checkpoint of an unfinished fit holds."""

    state: flow.FlowState
    fixed: flow.Fixed


def _fit_flow(job: Job, checkpoints: Checkpointer) -> PyTree:
    """Fits to the last step; logs and saves along the way."""
    options, sampler = job.config.flow, job.sampler
    batches = list(_encode(job))
    loop_state = _restore_or_init(job, checkpoints, batches)
    state, fixed = loop_state
    data = jnp.asarray(flow.standardise(fixed, aggregate.means(batches)))
    del batches
    at = int(state.step)
    with (
        Progress(options.num_steps, options.batch_size, step=at) as progress,
        interrupt.listening() as request,
    ):
        while at < options.num_steps:
            every = (options.log_every, options.checkpoint_every)
            stop = min(options.num_steps, *(at - at % n + n for n in every))
            state = jax.block_until_ready(sampler.train(state, fixed, data, stop - at))
            at = stop
            stopped_by = request.signal_number
            if not np.isfinite(state.loss):
                raise UserError(
                    f"the loss was not finite by step {at}; lower flow.learning_rate "
                    f"({options.learning_rate})"
                )
            if at % options.log_every == 0 or at == options.num_steps:
                count = at % options.log_every or options.log_every
                progress.train(at, {"loss": float(state.loss) / count})
                state = state._replace(loss=jnp.float32(0.0))
            is_last = at == options.num_steps
            due = at % options.checkpoint_every == 0 or stopped_by is not None
            if due and not is_last:
                unfinished = {"unfinished": _LoopState(state, fixed)}
                checkpoints.save(at, unfinished, config=job.identity)
            if stopped_by is not None and not is_last:
                checkpoints.wait()
                raise interrupt.Stopped(stopped_by, f"saved at step {at}")
    return sampler.params(state, fixed)


def _restore_or_init(
    job: Job, checkpoints: Checkpointer, batches: list[aggregate.Encoded]
) -> _LoopState:
    """The newest intact checkpoint, or the state before the first update."""
    start = _LoopState(
        job.sampler.init(), jax.tree.map(jnp.asarray, job.sampler.fixed(aggregate.moments(batches)))
    )
    restored = checkpoints.restore({"unfinished": start}, config=job.identity)
    return start if restored is None else restored[1]["unfinished"]
