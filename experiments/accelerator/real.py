"""Training on real images, with held-out bounds, and samplers of its latents."""

import functools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments.accelerator import packing
from experiments.accelerator.sizes import BY_SHAPE, Context, Row, configuration
from experiments.accelerator.worker import halving
from svae_jax import image_files, sampler_config
from svae_jax import samplers as sampler_lib
from svae_jax.analysis import drawing, evaluating, fitted, fitting, trained
from svae_jax.errors import UserError
from svae_jax.evaluation import grids
from svae_jax.run import interrupt
from svae_jax.run import workdir as workdirs
from svae_jax.training import loop

_unpack = functools.lru_cache(maxsize=1)(packing.unpack)


def _images(context: Context) -> tuple[packing.Images, packing.Images]:
    """The training and the held-out images."""
    splits = _unpack(context.images)
    return splits["train"], splits["test"]


def train(context: Context, model: str) -> Iterator[Row]:
    """Trains a model as `svae_jax.main` does; its held-out bounds, also where it is stopped."""
    yield from halving(functools.partial(_train, context, model), context.sizes.batch)


def _train(context: Context, model: str, batch: int) -> Iterator[Row]:
    epochs, images = context.sizes.epochs, _images(context)
    config = configuration(context.sizes, BY_SHAPE[images[0].shape[1:]], model, batch=batch)
    steps = len(images[0]) // batch  # of an epoch
    config.dataset.update(split="train", eval_split="test")
    config.update(num_epochs=float(epochs[-1]), log_every=steps, eval_every=steps)
    config.update(sample_every=steps * epochs[-1])
    config.checkpoint.every = steps * epochs[-1]
    directory, stopped = context.scratch / model, None
    shutil.rmtree(directory, ignore_errors=True)  # of a batch that was too large
    begin = time.perf_counter()
    try:
        loop.train(config, directory, images=images)
    except interrupt.Stopped as error:
        stopped = error
    seconds = time.perf_counter() - begin
    for values in workdirs.read_metrics(directory):
        epoch, remainder = divmod(values["step"], steps)
        if "eval/elbo" in values and epoch in epochs and remainder == 0:
            named = {"elbo": "ELBO, nats", "kl": "KL, nats", "bits_per_dim": "bits/dim"}
            bounds = {text: values[f"eval/{name}"] for name, text in named.items()}
            yield {"model": model, "batch": batch, "epochs": epoch, **bounds}
    yield {"trained": model, "to its end": "no" if stopped else "yes", "seconds": seconds}
    if stopped is not None:
        raise stopped


def samplers(context: Context, model: str) -> Iterator[Row]:
    """Fits a Gaussian and a mixture to a trained model, and evaluates their samples."""
    yield from _fit_and_evaluate(context, model, "gaussian", "mixture")


def flow(context: Context, model: str) -> Iterator[Row]:
    """Fits a flow, and evaluates the samples of all samplers again."""
    yield from _fit_and_evaluate(context, model, "flow")


def _fit_and_evaluate(context: Context, model: str, *names: str) -> Iterator[Row]:
    directory, images = context.scratch / model, _images(context)
    if not directory.exists():
        raise UserError(f"{model} was not trained")
    for name in names:
        config = sampler_config.base()
        if name == "flow":
            config.flow.update(context.sizes.flow)
        begin = time.perf_counter()
        found = fitting.fit(directory, name, config, images=images)
        seconds = time.perf_counter() - begin
        yield {"fitted": name, "steps": found["num_steps"], "seconds": seconds}
    _save_grid(context, directory)
    num_samples, importance_samples = context.sizes.num_samples
    settings = evaluating.Settings(num_samples=num_samples, importance_samples=importance_samples)
    found = evaluating.evaluate(directory, settings, images=images)
    for name, figure in (found["bounds"] | found["reconstruction"]).items():
        if isinstance(figure, dict):
            yield {"held out": name, **figure}
    for name, sample in found["samples"].items():
        distance = sample["pixels"]["figures"]["swd_mean"]
        yield {"samples": name, "distance": "sliced Wasserstein", **distance}


def _save_grid(context: Context, directory: Path) -> None:
    """Writes samples.png: 32 images from each sampler, side by side."""
    model = trained.load(directory)
    loaded = [
        fitted.load_sampler(directory, name, model)
        for name in sampler_lib.names()
        if fitted.is_fitted(directory, name)
    ]
    drawn = [next(drawing.draw(model, sampler, jax.random.key(0), 32)) for sampler in loaded]
    picture = grids.row([grids.grid(images, columns=4) for images in drawn])
    image_files.save_picture(context.out / "samples.png", picture)
