"""Fits a sampler to the model of a workdir; resumable, as training is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm
from jaxtyping import PyTree

from svae_jax import files, sampler_config, samplers, seeds, terminal
from svae_jax.analysis import fitted, trained
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.run import checkpoint, interrupt, workdir
from svae_jax.run.checkpoint import Checkpointer
from svae_jax.run.progress import Progress
from svae_jax.samplers import aggregate
from svae_jax.samplers.base import Learned

_KEEP = 2  # checkpoints: the newest, and the one before it in case that one is damaged


class SamplerFit(NamedTuple):
    """Everything a fit needs that stays fixed."""

    name: str
    config: ml_collections.ConfigDict
    folder: Path
    trained: trained.Trained
    sampler: Any
    identity: dict[str, Any]


@runtime.own_numerics()
def fit(
    directory: str | Path,
    name: str,
    config: ml_collections.ConfigDict,
    *,
    images: Any = None,
    data_dir: str | Path = "",
) -> dict[str, Any]:
    """Fits a sampler to the newest checkpoint of a run, or resumes a fit that was interrupted.

    The training images are encoded anew; the run may still be training, as its checkpoint is only
    read. A sampler of an older checkpoint is replaced.

    Args:
        directory: the workdir.
        name: one of `samplers.names()`, other than `prior`.
        config: see `sampler_config.base`.
        images: the arrays that the run is of, if it is of arrays from Python.
        data_dir: where the run's data set is now, if it has moved.

    Returns:
        `sampler`, the model's `step` and `fingerprint`, the fit's `num_steps`, and `parameters`,
        the number of entries of the sampler's arrays.

    Raises:
        UserError: a mistake that the user can correct.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the fit has saved.
    """
    directory = files.user_path(directory, "--workdir")
    if name == "prior":
        raise UserError("--sampler=prior needs no fit: it is the model's own")
    if name in samplers.names():
        sampler_config.check(config, name)
    model = trained.load(directory, images=images, data_dir=data_dir)
    sampler = sampler_config.make(config, name, model.model.posterior.shape)
    identity: dict[str, Any] = {
        "sampler": name,
        "model": fitted.model_identity(model),
        "settings": sampler_config.identity(config, name),
        "version": fitted.version(sampler),
    }
    folder = fitted.place(directory, name)
    workdir.create(folder)
    fit = SamplerFit(name, config, folder, model, sampler, identity)
    with workdir.locked(folder):
        params = _finished(fit)
        if params is None:
            with Checkpointer(folder / "checkpoints", keep=_KEEP) as checkpoints:
                params = _fit(fit, checkpoints)
                checkpoints.save(sampler.num_steps, {"params": params}, config=identity)
    return {
        "sampler": name,
        **identity["model"],
        "num_steps": sampler.num_steps,
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params)),
    }


def _finished(fit: SamplerFit) -> PyTree | None:
    """The arrays of a finished fit; removes one of another model, and refuses other settings."""
    folder = fit.folder / "checkpoints"
    if not folder.is_dir() or not any(path.name.isdecimal() for path in folder.iterdir()):
        return None
    try:
        loaded = checkpoint.load(folder)
    except checkpoint.NoneIntactError as error:
        raise UserError(f"{error}; or delete {fit.folder} to fit it anew") from None
    if loaded.config.get("sampler") != fit.name:
        raise UserError(f"{folder} is not of the sampler {fit.name}; move it away")
    if loaded.config["model"] != fit.identity["model"]:
        terminal.say(
            f"the sampler {fit.name} of step {loaded.config['model']['step']} is replaced by one "
            f"of step {fit.trained.step}"
        )
        checkpoint.remove(folder)
        return None
    if loaded.config.get("version", 1) != fit.identity["version"]:
        raise UserError(
            f"{fit.folder} was fitted by another version of svae_jax; delete it to fit it anew"
        )
    ours, theirs = fit.identity["settings"], loaded.config["settings"]
    changed = [f"{k}={ours[k]!r} (was {theirs.get(k)!r})" for k in ours if ours[k] != theirs.get(k)]
    if changed:
        raise UserError(
            f"{fit.folder} was fitted with other settings: {', '.join(changed)}; set them back, or "
            "delete that directory to fit it anew"
        )
    return loaded.state.get("params")


def _posteriors(fit: SamplerFit) -> aggregate.Posteriors:
    """The posteriors of all training images, with a progress bar on a terminal."""
    model, variables, config, _ = fit.trained
    images = fit.trained.images(config.dataset.split)

    def watched(batches: Iterator[Any]) -> Iterator[Any]:
        terminal.say(f"encoding {len(images):,} training images")
        file = terminal.stderr()
        with tqdm.tqdm(total=len(images), unit=" images", disable=None, file=file) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch[0]) if isinstance(batch, tuple) else len(batch))

    key = seeds.key(fit.config.seed)
    return aggregate.Posteriors(
        lambda: watched(aggregate.encode(model, variables, images)),
        lambda: watched(aggregate.samples(model, variables, key, images)),
    )


def _fit(fit: SamplerFit, checkpoints: Checkpointer) -> PyTree:
    """Fits to the last step; logs and saves along the way. A closed form is one step."""
    sampler, posteriors = fit.sampler, _posteriors(fit)
    last = sampler.num_steps
    log_every, save_every = sampler_config.every(fit.config, fit.name, last)
    at, state = _restore_or_init(fit, checkpoints, posteriors)
    with contextlib.ExitStack() as stack:
        if isinstance(sampler, Learned):  # the others take one step, which Ctrl-C may end
            progress = stack.enter_context(Progress(last, sampler.batch_size, step=at))
            request = stack.enter_context(interrupt.listening())
        while at < last:
            stop = min(last, *(at - at % n + n for n in (log_every, save_every)))
            try:
                state = jax.block_until_ready(sampler.step(state, posteriors, stop - at))
            except ValueError as error:
                raise UserError(f"{fit.name}.{error}") from None
            at = stop
            if not isinstance(sampler, Learned):
                break
            stopped_by = request.signal_number
            since = at % log_every or log_every
            metrics, counted_anew = sampler.logged(state, since)
            for metric, value in metrics.items():
                if not np.isfinite(value):
                    raise UserError(
                        f"the {metric} was not finite by step {at}; lower {fit.name}.learning_rate "
                        f"({fit.config[fit.name].learning_rate})"
                    )
            if at % log_every == 0 or at == last:
                progress.train(at, metrics)
                state = counted_anew
            if at == last:
                break
            if at % save_every == 0 or stopped_by is not None:
                checkpoints.save(at, {"unfinished": state}, config=fit.identity)
            if stopped_by is not None:
                checkpoints.wait()
                raise interrupt.Stopped(stopped_by, f"saved at step {at}")
    return sampler.params(state)


def _restore_or_init(
    fit: SamplerFit, checkpoints: Checkpointer, posteriors: aggregate.Posteriors
) -> tuple[int, PyTree]:
    """The newest intact checkpoint, or the state before the first step."""
    start = fit.sampler.init(posteriors)
    restored = checkpoints.restore({"unfinished": start}, config=fit.identity)
    return (0, start) if restored is None else (restored[0], restored[1]["unfinished"])
