"""What a report shows of one run: its facts, its metrics, and its pictures by section."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Num

from svae_jax import config as configs
from svae_jax import model as models
from svae_jax import sizes, terminal
from svae_jax.analysis import evaluating, figures, fitted
from svae_jax.analysis.exploring import Run
from svae_jax.analysis.exploring.locality import Locality
from svae_jax.errors import UserError
from svae_jax.evaluation.per_image import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 8
_SAMPLES = 32
_PAIRS = 3  # of images, for edits and interpolation
_DIRECTIONS = 3
_MOST_OF_DIRECTIONS = 500  # images from which the directions are found
_VALUES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # standard deviations along a direction
_LOCALITY = 8  # images at whose latents the Jacobian is taken
_SHOWN_CELLS = 16  # the most cells along a side that are shown one by one

Pixels = Num[np.ndarray, "b h w c"]


class Shown(NamedTuple):
    """A picture and what is said of it.

    Attributes:
        png: the picture's file.
        alt: what it shows, for those who do not see it.
        caption: below it, if not empty.
    """

    png: bytes
    alt: str
    caption: str = ""


Row = Shown | str  # a picture, or why there is none


class Content(NamedTuple):
    """All that is shown of a run.

    Attributes:
        label: the run's name on the page.
        data: its data set and held-out split.
        facts: name -> value, the first table.
        config: its configuration, flat.
        metrics: the rows of `metrics.jsonl`.
        pictures: section -> row -> picture, or the reason why there is none.
        evaluation: what `evaluate` wrote, or None.
    """

    label: str
    data: str
    facts: dict[str, str]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    pictures: dict[str, dict[str, Row]]
    evaluation: dict[str, Any] | None


def of_run(run: Run, label: str, seed: int) -> Content:
    """Computes the content of a run.

    Raises:
        UserError: its data set or its files cannot be read, or it holds too few images.
    """
    dataset, height, width = run.config.dataset, *sizes.image_shape(run.config)[:2]
    name = dataset.data_dir if dataset.name == "folder" else dataset.name
    images = run.images()
    if len(images) < 2:
        raise UserError(f"{run.directory}: a report needs 2 held-out images, got {len(images)}")
    metrics = run.metrics()
    terminal.say(f"{label}: samples")
    shown: dict[str, dict[str, Row]] = {"samples": _samples(run, label, seed)}
    terminal.say(f"{label}: reconstructions, edits, interpolation, directions")
    shown["reconstructions"] = _reconstructions(run, label, images[:_COLUMNS])
    shown["edits"] = _edits(run, label, images)
    shown["interpolation"] = _interpolation(run, label, images)
    shown["directions"] = _directions(run, label, images[:_MOST_OF_DIRECTIONS])
    terminal.say(f"{label}: locality")
    found = run.locality(images[:_LOCALITY])
    shown["locality"] = {"": _locality(found, label)}
    shown["kl"] = {"": _kl(run, label, images[:_COLUMNS])}
    evaluation = evaluating.read(run.directory)
    facts = _facts(run, metrics, found)
    identity = fitted.model_identity(run)
    if evaluation and any(evaluation.get(name) != value for name, value in identity.items()):
        facts["evaluation.json"] = "of another checkpoint: run svae_jax.evaluate again"
        evaluation = None
    return Content(
        label=label,
        data=f"{name} {dataset.eval_split}, {height} x {width}",
        facts=facts,
        config=configs.flatten(run.config.to_dict()),
        metrics=metrics,
        pictures=shown,
        evaluation=evaluation,
    )


def png(figure: "Figure") -> bytes:
    """A figure as a file."""
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    return file.getvalue()


def _facts(run: Run, metrics: Sequence[Mapping[str, Any]], found: Locality) -> dict[str, str]:
    posterior, (h, w, n) = run.model.posterior, run.latent_shape
    numbers = models.num_params(run.variables["params"])
    dataset = run.config.dataset
    facts = {
        "data": f"{dataset.name}, {dataset.height} x {dataset.width}",
        "held out": dataset.eval_split,
        "posterior": posterior.name,
        "latent": f"{h} x {w} x {n} = {h * w * n:,}",
        "parameters of the encoder": f"{numbers['encoder']:,}",
        "parameters of the decoder": f"{numbers['decoder']:,}",
        "training steps": f"{run.step:,}",
    }
    evaluated = [row for row in metrics if row.get("eval/elbo") is not None]
    evaluated = [row for row in evaluated if row["step"] <= run.step]
    if evaluated:
        last = evaluated[-1]
        for name, metric in METRICS.items():
            if last.get(f"eval/{name}") is not None:
                facts[metric.label] = f"{last[f'eval/{name}']:,.{metric.digits}f}"
        if last["step"] != run.step:
            facts["evaluated after"] = f"{last['step']:,} training steps"
    if h * w > 1:
        facts["energy in the cell's own patch"] = (
            f"{found.own_share:.0%} (even: {found.uniform_own_share:.0%})"
        )
    facts["spread of a cell, pixels"] = f"{found.spread:.1f} (even: {found.uniform_spread:.1f})"
    return facts


def _samples(run: Run, label: str, seed: int) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name in run.samplers:
        try:
            drawn = run.display(run.sample(_SAMPLES, name, seed))
        except UserError as error:  # of another checkpoint, or half fitted
            rows[name] = str(error)
            continue
        alt = f"{_SAMPLES} samples of {label}, latents drawn from {name}"
        rows[name] = Shown(png(figures.images(drawn, _COLUMNS)), alt)
    return rows


def _reconstructions(run: Run, label: str, images: Pixels) -> dict[str, Row]:
    figure = figures.reconstructions(run.display(images), run.display(run.reconstruct(images)))
    alt = f"held-out images, each above its reconstruction by {label}"
    return {"": Shown(png(figure), alt)}


def _edits(run: Run, label: str, images: Pixels) -> dict[str, Row]:
    count = min(_PAIRS, len(images) // 2)
    a, b = images[:count], images[count : 2 * count]
    h, w, _ = run.latent_shape
    rows: dict[str, Row] = {}
    for name, where in _edited_cells(h, w).items():
        shown_a, shown_b = run.display(a), run.display(b)
        changed = run.display(run.edit(a, b, where))
        if run.config.dataset.channels in (1, 3):
            figure = figures.edits(shown_a, shown_b, changed, where)
        else:  # channels side by side, where a cell has a patch in each
            figure = figures.rows({"A": shown_a, "B": shown_b, "A with cells of B": changed})
        alt = f"images A, images B, and A with {name} of the latent of B, by {label}"
        rows[name] = Shown(png(figure), alt)
    return rows


def _edited_cells(h: int, w: int) -> dict[str, Bool[np.ndarray, "{h} {w}"]]:
    one, half = np.zeros((2, h, w), bool)
    if h * w == 1:
        return {"the whole latent": ~one}
    one[h // 2, w // 2] = True
    if w > 1:
        half[:, w // 2 :] = True
        return {"one cell": one, "the right half": half}
    half[h // 2 :] = True
    return {"one cell": one, "the lower half": half}


def _interpolation(run: Run, label: str, images: Pixels) -> dict[str, Row]:
    pairs = [images[2 * i : 2 * i + 2] for i in range(min(_PAIRS, len(images) // 2))]
    paths = {
        f"pair {i + 1}": run.display(run.interpolate(pair[0], pair[1], _COLUMNS))
        for i, pair in enumerate(pairs)
    }
    alt = f"{len(paths)} lines of images by {label}, each from one reconstruction to another"
    return {"": Shown(png(figures.rows(paths)), alt)}


def _directions(run: Run, label: str, images: Pixels) -> dict[str, Row]:
    found = run.directions(images, _DIRECTIONS)
    paths = {
        f"direction {i + 1}": run.display(run.traverse(images[0], direction, _VALUES))
        for i, direction in enumerate(found)
    }
    alt = (
        f"an image's latent by {label}, moved along {len(paths)} principal directions, a line each"
    )
    return {"": Shown(png(figures.traversal(paths, _VALUES)), alt)}


def _locality(found: Locality, label: str) -> Row:
    h, w = found.energy.shape[:2]
    if max(h, w) > _SHOWN_CELLS:
        return f"{h} x {w} cells are too many to show one by one"
    caption = "one cell makes the whole image" if h * w == 1 else ""
    return Shown(png(figures.reach(found)), f"how far each cell of {label} reaches", caption)


def _kl(run: Run, label: str, images: Pixels) -> Shown:
    found = run.kl_map(images)
    rest = float(np.mean(found.dependence))
    caption = f"{rest:,.1f} nats an image more belong to no single location" if rest > 0.05 else ""
    alt = f"images above the KL of each location of their latents by {label}"
    return Shown(png(figures.kl_maps(run.display(images), found)), alt, caption)
