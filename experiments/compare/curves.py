"""The held-out ELBO of a comparison's runs while they trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.compare.summary import FLOOR_PREFIX
from svae_jax import files
from svae_jax.analysis import figures
from svae_jax.run import workdir as workdirs

# PCA with as many latents; it has the first name where the two are the same, as for a vector.
FLOORS = (f"{FLOOR_PREFIX}same latent", f"{FLOOR_PREFIX}as many latents")


def of_run(directory: Path, batch_size: int) -> list[dict[str, float]]:
    """The evaluations of a run.

    Args:
        directory: its workdir.
        batch_size: images of a training step.

    Returns:
        Of each, `step`, `epochs`, `minutes` of training until then, without those of evaluations,
        and the held-out `elbo` in nats. A resumed run has its minutes too: they follow from the
        images a second of its log.

    Raises:
        UserError: the metrics cannot be read.
    """
    num_images = (files.read_json(directory / "data.json") or {})["train"]["num_images"]
    found, step, seconds = [], 0, 0.0
    for row in workdirs.read_metrics(directory):
        if speed := row.get("images_per_second"):
            seconds += (row["step"] - step) * batch_size / speed
            step = row["step"]
        if (elbo := row.get("eval/elbo")) is not None:
            epochs = row["step"] * batch_size / num_images
            point = {"epochs": epochs, "minutes": seconds / 60, "elbo": elbo}
            found.append({"step": row["step"], **point})
    return found


def draw(runs: Sequence[Mapping[str, Any]]) -> Any:
    """The ELBO against epochs and against minutes, of each model's first seed.

    Args:
        runs: as in `comparison.json`; the dashed line of a model is PCA with as many latents.
    """
    first = [run for run in runs if run["seed"] == min(r["seed"] for r in runs)]
    floors = {
        run["model"]: run["figures"][name]
        for run in first
        for name in FLOORS  # the last one counts
        if name in run["figures"]
    }
    elbo = ("elbo", "held-out ELBO, nats")
    return figures.lines(
        {run["model"]: run["curve"] for run in first},
        [(("epochs", "epochs"), elbo), (("minutes", "minutes of training"), elbo)],
        floors,
    )
