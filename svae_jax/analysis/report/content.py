"""What a report shows of one run: its facts, its curves, and its pictures by section."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Num

from svae_jax import config as configs
from svae_jax import model as models
from svae_jax import sizes, terminal
from svae_jax.analysis import assessment, exploring, fitted
from svae_jax.analysis.exploring import Run
from svae_jax.analysis.report import pictures
from svae_jax.analysis.report.pictures import Picture
from svae_jax.errors import UserError
from svae_jax.evaluation.per_image import METRICS

_COLUMNS = 8
_SAMPLES = 32
_RECONSTRUCTIONS = 16
_EDITS = 2  # pairs of images
_PATHS = 3  # pairs of images
_DIRECTIONS = 3
_MOST_OF_DIRECTIONS = 500  # images from which the directions are found
_LOCALITY = 8  # images at whose latents the Jacobian is taken
_SHOWN_CELLS = 16  # the most cells along a side that are shown one by one


Pixels = Num[np.ndarray, "b h w c"]


class Shown(NamedTuple):
    """A picture and what is said of it.

    Attributes:
        picture: colours and opacity.
        alt: what it shows, for those who do not see it.
        caption: below it, if not empty.
    """

    picture: Picture
    alt: str
    caption: str = ""


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
    pictures: dict[str, dict[str, Shown | str]]
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
    shown: dict[str, dict[str, Shown | str]] = {"samples": _samples(run, label, seed)}
    shown["reconstructions"] = _reconstructions(run, label, images[:_RECONSTRUCTIONS])
    terminal.say(f"{label}: edits, interpolation, directions")
    shown["edits"] = _edits(run, label, images)
    shown["interpolation"] = _interpolation(run, label, images)
    shown["directions"] = _directions(run, label, images[:_MOST_OF_DIRECTIONS])
    terminal.say(f"{label}: locality")
    found = run.locality(images[:_LOCALITY])
    shown["locality"] = {"": _locality(found, label)}
    shown["kl"] = {"": _kl(run, label, images[:_COLUMNS])}
    evaluation = assessment.read(run.directory)
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


def _facts(
    run: Run, metrics: Sequence[Mapping[str, Any]], found: exploring.locality.Locality
) -> dict[str, str]:
    posterior, (h, w, n) = run.model.posterior, run.latent_shape
    sizes = models.num_params(run.variables["params"])
    dataset = run.config.dataset
    facts = {
        "data": f"{dataset.name}, {dataset.height} x {dataset.width}",
        "held out": dataset.eval_split,
        "posterior": posterior.name,
        "latent": f"{h} x {w} x {n} = {h * w * n:,}",
        "parameters of the encoder": f"{sizes['encoder']:,}",
        "parameters of the decoder": f"{sizes['decoder']:,}",
        "updates": f"{run.step:,}",
    }
    evaluated = [row for row in metrics if row.get("eval/elbo") is not None]
    evaluated = [row for row in evaluated if row["step"] <= run.step]
    if evaluated:
        last = evaluated[-1]
        for name, metric in METRICS.items():
            if last.get(f"eval/{name}") is not None:
                facts[metric.label] = f"{last[f'eval/{name}']:,.{metric.digits}f}"
        if last["step"] != run.step:
            facts["evaluated after"] = f"{last['step']:,} updates"
    if h * w > 1:
        facts["energy in the cell's own patch"] = (
            f"{found.own_share:.0%} (if even: {found.uniform_own_share:.0%})"
        )
    facts["spread of a cell, pixels"] = f"{found.spread:.1f} (if even: {found.uniform_spread:.1f})"
    return facts


def _samples(run: Run, label: str, seed: int) -> dict[str, Shown | str]:
    rows: dict[str, Shown | str] = {}
    for name in run.samplers:
        try:
            drawn = run.sample(_SAMPLES, name, seed)
        except UserError as error:  # of another checkpoint, or half fitted
            rows[name] = str(error)
            continue
        picture = pictures.grid(pictures.tiles(run.display(drawn)), _COLUMNS)
        rows[name] = Shown(picture, f"{_SAMPLES} samples of {label}, latents drawn from {name}")
    return rows


def _reconstructions(run: Run, label: str, images: Pixels) -> dict[str, Shown | str]:
    both = [
        pictures.tiles(run.display(images)),
        pictures.tiles(run.display(run.reconstruct(images))),
    ]
    lines = [part[i : i + _COLUMNS] for i in range(0, len(images), _COLUMNS) for part in both]
    # A short last row would mix with the row of its reconstructions.
    lines = lines if len(lines[-1]) == len(lines[0]) else lines[:-2] or lines
    picture = pictures.grid(np.concatenate(lines), len(lines[0]), row_gaps=(2, 14))
    return {"": Shown(picture, f"held-out images, each above its reconstruction by {label}")}


def _edits(run: Run, label: str, images: Pixels) -> dict[str, Shown | str]:
    h, w, _ = run.latent_shape
    if max(h, w) > _SHOWN_CELLS:
        return {"": f"{h} x {w} cells are too many to show one by one"}
    rows: dict[str, Shown | str] = {}
    for i in range(min(_EDITS, len(images) // 2)):
        a, b = run.encode(images[2 * i : 2 * i + 2]).mean
        # As `run.edit` does for one cell, for all in one batch.
        single = np.eye(h * w, dtype=bool).reshape(h * w, h, w, 1)
        ends = pictures.tiles(run.display(run.decode(np.stack([a, b]))))
        tiles = pictures.tiles(run.display(run.decode(np.where(single, b, a))))
        tiles = _framed(tiles, (h, w)) if run.config.dataset.channels in (1, 3) else tiles
        picture = pictures.beside(pictures.grid(ends, 1 if h > 1 else 2), pictures.grid(tiles, w))
        alt = (
            f"reconstructions of two images by {label}, and the first with each cell of the second"
        )
        rows[f"pair {i + 1}"] = Shown(picture, alt)
    return rows


def _interpolation(run: Run, label: str, images: Pixels) -> dict[str, Shown | str]:
    pairs = range(min(_PATHS, len(images) // 2))
    paths = [run.interpolate(images[2 * i], images[2 * i + 1], _COLUMNS) for i in pairs]
    picture = pictures.grid(pictures.tiles(run.display(np.concatenate(paths))), _COLUMNS)
    alt = f"{len(paths)} lines of images by {label}, each from one reconstruction to another"
    return {"": Shown(picture, alt)}


def _directions(run: Run, label: str, images: Pixels) -> dict[str, Shown | str]:
    directions = run.directions(images, _DIRECTIONS)
    paths = [run.traverse(images[0], direction) for direction in directions]
    picture = pictures.grid(pictures.tiles(run.display(np.concatenate(paths))), len(paths[0]))
    alt = (
        f"an image's latent by {label}, moved along {len(paths)} principal directions, a line each"
    )
    return {"": Shown(picture, alt)}


def _locality(found: exploring.locality.Locality, label: str) -> Shown | str:
    h, w, *size = found.energy.shape
    if max(h, w) > _SHOWN_CELLS:
        return f"{h} x {w} cells are too many to show one by one"
    tiles = _framed(pictures.heat(found.energy.reshape(h * w, *size)), (h, w))
    caption = f"spread {found.spread:.1f} pixels"
    if h * w > 1:
        caption = f"{found.own_share:.0%} in the own patch, {caption}"
    else:
        caption = f"one cell makes the whole image; {caption}"
    return Shown(pictures.grid(tiles, w), f"how far each cell of {label} reaches", caption)


def _kl(run: Run, label: str, images: Pixels) -> Shown:
    found = run.kl_map(images)
    top = float(found.over_image.max())
    shown = run.display(images)
    # Where channels stand side by side, so do copies of the map.
    copies = shown.shape[2] // found.over_image.shape[2]
    heat = pictures.heat(np.tile(found.over_image, copies), top)
    tiles = np.concatenate([pictures.tiles(shown), heat])
    caption = f"from 0 (dark) to {top:,.0f} nats a location"
    rest = float(np.mean(found.dependence))
    if rest > 0.05:
        caption += f"; {rest:,.1f} nats an image more belong to no single location"
    picture = pictures.grid(tiles, len(images), row_gaps=(2,))
    return Shown(
        picture, f"images above the KL of each location of their latents by {label}", caption
    )


def _framed(tiles: pictures.Tiles, shape: tuple[int, int]) -> pictures.Tiles:
    """A tile for each cell, with the cell's patch framed; a single cell needs no frame."""
    if shape == (1, 1):
        return tiles
    cells = np.ndindex(*shape)
    return np.stack(
        [pictures.framed(tile, cell, shape) for tile, cell in zip(tiles, cells, strict=True)]
    )
