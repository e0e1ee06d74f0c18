"""Rate and distortion: what models pay in nats for an image, and how well they reconstruct it.

    python -m experiments.rates --config=configs/cifar10.py --workdir=runs/rates

trains each model with each weight β of the KL, and computes PCA of the images with several numbers
of components, in closed form. --config.FIELD=VALUE sets a field for all. Reconstructions are of
held-out images, from one sample of z each.

The workdir receives rates.json and rates.png. The same command continues what was stopped.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.compare import summary
from experiments.options import Parser, nonempty_path, run_command
from svae_jax import command_line
from svae_jax.analysis import figures, trained
from svae_jax.data import cache
from svae_jax.devices import runtime
from svae_jax.evaluation import bounds, closed_forms, reconstruction
from svae_jax.files import os_errors_for_user
from svae_jax.model import linear
from svae_jax.model.linear import LinearPath
from svae_jax.run import workdir as workdirs
from svae_jax.training import job as jobs
from svae_jax.training import loop

MODELS = ("vector", "mvn", "best")
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
COMPONENTS = (10, 25, 50, 100, 200, 400, 800, 1600)
PCA = "PCA"

Point = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Trains what is missing, evaluates, and draws.

    Raises:
        UserError: a mistake in the options, or in the configuration.
        interrupt.Stopped: after SIGTERM or Ctrl-C, once the run has saved.
    """
    parser = Parser("rates", __doc__)
    parser.add_argument("--config", required=True, help="configuration: configs/cifar10.py")
    parser.add_argument(
        "--workdir", type=nonempty_path, required=True, help="directory of all runs"
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="after the config's colon")
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS, help="weights of the KL")
    options, common = parser.parse_known_args(argv)
    runtime.keep_freed_memory()
    runtime.keep_compiled_programs(cache.home() / "compiled")
    file = options.config.partition(":")[0]
    points: list[Point] = []
    for model in options.models:
        for beta in options.betas:
            config, _ = command_line.load_config(f"{file}:{model}", common)
            config.objective.beta = beta
            directory = options.workdir / f"{model}_beta={beta:g}"
            result = loop.train(config, directory)
            job = jobs.prepare(config, directory)
            points.append({"model": model, "beta": beta, **_measure(job, directory)})
    points += _pca(job)
    settings = {
        "dataset": job.config.dataset.name,
        "split": job.config.dataset.eval_split,
        "num_steps": result["step"],
        "batch_size": job.config.batch_size,
        "device": summary.device(result["device"]),
        "versions": result["versions"],
        "command": shlex.join(["python", "-m", "experiments.rates", *argv]),
    }
    workdirs.write_json(options.workdir / "rates.json", {"settings": settings, "points": points})
    path = options.workdir / "rates.png"
    with os_errors_for_user(f"{path} cannot be written"):
        draw(points).savefig(path)
    print(f"written: {path}")


def draw(points: Sequence[Point]) -> Any:
    """PSNR and SSIM against the KL, a line for each model."""
    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(point["model"], []).append(point)
    return figures.lines(
        {name: sorted(found, key=lambda p: p["kl"]) for name, found in series.items()},
        x=("kl", "rate: KL, nats an image"),
        ys=(("psnr", "PSNR, dB"), ("ssim", "SSIM")),
    )


def _measure(job: jobs.Job, directory: Path) -> Point:
    variables = trained.load(directory).variables
    return _figures(job, job.recipe, variables)


def _pca(job: jobs.Job) -> list[Point]:
    """PCA of whole images; none above `linear.MAX_DIMS` values, or without an optimal σ."""
    height, width, channels = shape = job.recipe.image_shape
    noise, moments, points = job.recipe.likelihood, None, []
    if height * width * channels > linear.MAX_DIMS or not noise.has_optimal:
        return []
    for components in (n for n in COMPONENTS if n < height * width * channels):
        path = LinearPath(shape, 1, 1, components, (height, width))
        moments = moments or closed_forms.moments(path, noise, job.train_images)
        pca = linear.pca(path, moments, noise.min_sigma)
        recipe, variables = closed_forms.as_run(job.recipe, path, noise, pca)
        points.append({"model": PCA, "components": components, **_figures(job, recipe, variables)})
    return points


def _figures(job: jobs.Job, recipe: Any, variables: Any) -> Point:
    scale = bounds.calibrate(recipe, variables, job.train_images, job.mesh)
    found, _ = reconstruction.evaluate(recipe, variables, job.eval_images, scale, job.mesh)
    return {
        "kl": found["bounds"]["kl"].value,
        "psnr": found["reconstruction"]["psnr"].value,
        "ssim": found["reconstruction"]["ssim"].value,
    }


if __name__ == "__main__":
    run_command(main)
