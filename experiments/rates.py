"""Rate and distortion: what models pay in nats for an image, and how well they reconstruct it.

    python -m experiments.rates --config=cifar10 --workdir=runs/rates

trains each model with each weight β of the KL, and computes PCA of the images with several numbers
of components, in closed form. --config.FIELD=VALUE sets a field for all. Reconstructions are of
held-out images, from one sample of z each.

The workdir receives rates.json, rates.md and rates.png. The same command continues what was
stopped.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import options, study
from svae_jax.analysis import figures, tables, trained
from svae_jax.evaluation import bounds, closed_forms, reconstruction
from svae_jax.files import os_errors_for_user
from svae_jax.model import linear
from svae_jax.training import job as jobs
from svae_jax.training import loop

COMPONENTS = (10, 25, 50, 100, 200, 400, 800, 1600)  # of PCA

Point = dict[str, Any]


def _define(values: flags.FlagValues) -> None:
    options.define_path("workdir", "directory of all runs", values)
    models, betas = ["vector", "mvn", "best"], ["0.1", "0.3", "1", "3", "10", "30"]
    options.define_list("models", models, "after the config's colon", values, separator=" ")
    options.define_list("betas", betas, "weights of the KL", values, separator=" ")
    for name in ("models", "betas"):
        flags.register_validator(name, bool, "must have one word at least", values)


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, evaluates, and draws.

    Raises:
        UserError: a mistake in the options, or in the configuration.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the run has saved.
    """
    values, file = study.begin(argv, __doc__, _define)
    points: list[Point] = []
    for model, beta in itertools.product(values.models, values.betas):
        fields = {**options.overrides(values), "objective.beta": beta}
        config = options.load(f"{file}:{model}", fields)
        directory = values.workdir / f"{model}_beta={config.objective.beta:g}"
        result = loop.train(config, directory)
        job, variables = jobs.prepare(config, directory), trained.load(directory).variables
        measured = _figures(job, job.recipe, variables)
        points.append({"model": model, "beta": config.objective.beta, **measured})
    points += _pca(job)
    settings = study.settings("rates", argv, config, result)
    study.write(values.workdir / "rates", {"settings": settings, "runs": points}, render)
    points.sort(key=lambda point: point["kl"])
    series: dict[str, list[Point]] = {model: [] for model in values.models}
    for point in points:
        series.setdefault(point["model"], []).append(point)
    path, rate = values.workdir / "rates.png", ("kl", "rate: KL, nats an image")
    panels = [(rate, ("psnr", "PSNR, dB")), (rate, ("ssim", "SSIM"))]
    with os_errors_for_user(f"{path} cannot be written"):
        figures.lines(series, panels).savefig(path)
    print(f"written: {path}")


def render(content: Mapping[str, Any]) -> str:
    """The whole of `rates.md`, from the content of `rates.json`."""
    settings = content["settings"]
    rows = [
        {
            "model": point["model"],
            "β, or components": f"{point.get('beta', point.get('components')):g}",
            "KL, nats": f"{point['kl']:,.1f}",
            "PSNR, dB": f"{point['psnr']:.2f}",
            "SSIM": f"{point['ssim']:.4f}",
        }
        for point in content["runs"]
    ]
    return (
        f"# Rate and distortion\n\n{tables.markdown(rows)}\n\n"
        f"`{settings['split']}` of `{settings['dataset']}`; {settings['num_steps']:,} training "
        f"steps of {settings['batch_size']} images; one seed; {settings['device']}.\n\n"
        f"Made by `{settings['command']}`.\n"
    )


def _pca(job: jobs.Job) -> list[Point]:
    """PCA of whole images; none above `linear.MAX_DIMS` values, or without an optimal σ."""
    height, width, _ = shape = job.recipe.image_shape
    noise, moments, points = job.recipe.likelihood, None, []
    if math.prod(shape) > linear.MAX_DIMS or not noise.has_optimal:
        return []
    for components in (n for n in COMPONENTS if n < math.prod(shape)):
        path = linear.LinearPath(shape, 1, 1, components, (height, width))
        moments = moments or closed_forms.moments(path, noise, job.train_images)
        pca = linear.pca(path, moments, noise.min_sigma)
        measured = _figures(job, *closed_forms.as_run(job.recipe, path, noise, pca))
        points.append({"model": "PCA", "components": components, **measured})
    return points


def _figures(job: jobs.Job, recipe: Any, variables: Any) -> Point:
    scale = bounds.calibrate(recipe, variables, job.train_images, job.mesh)
    found, _ = reconstruction.evaluate(recipe, variables, job.eval_images, scale, job.mesh)
    quality = {name: found["reconstruction"][name].value for name in ("psnr", "ssim")}
    return {"kl": found["bounds"]["kl"].value, **quality}


if __name__ == "__main__":
    options.run_command(main)
