"""The picture of a comparison, after the paper's Figures 2 and 3: reconstructions and samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from svae_jax import pixels as pixel_lib
from svae_jax.analysis import drawing, fitted, trained
from svae_jax.evaluation import grids, steps

Pixels = UInt8[np.ndarray, "n h w c"]

COLUMNS = 16
_SHOWN = ("prior", "flow", "mixture", "gaussian")  # of these, the prior and the next that is fitted


class Strip(NamedTuple):
    """One row of the picture."""

    model: str
    what: str
    images: Pixels


def strips(
    directories: Mapping[str, Path], samplers: Sequence[str], split: str, seed: int = 0
) -> list[Strip]:
    """Held-out images, and of each model reconstructions and samples.

    Args:
        directories: model -> the workdir of a run.
        samplers: those that are fitted to every run; shown are the prior and the best of the rest.
        split: the held-out images, of which the first are shown; empty: the runs' own.
        seed: of everything drawn.
    """
    shown = [name for name in _SHOWN if name in samplers]
    if shown[:1] == ["prior"]:
        shown = shown[:2]
    found: list[Strip] = []
    key = jax.random.key(seed)
    for model, directory in directories.items():
        run = trained.load(directory)
        originals = np.asarray(run.images(split)[:COLUMNS])
        if not found:
            shown_originals = pixel_lib.to_uint8(run.pixels.to_float(originals))
            found.append(Strip("", "held out", np.asarray(shown_originals)))
        images = steps.reconstruct(run.model, run.variables, key, originals)
        found.append(Strip(model, "reconstructed", np.asarray(pixel_lib.to_uint8(images))))
        for name in shown:
            sampler = fitted.load_sampler(directory, name, run)
            drawn = np.concatenate(list(drawing.draw(run, sampler, key, COLUMNS)))
            found.append(Strip(model, f"samples, {name}", np.asarray(pixel_lib.to_uint8(drawn))))
    return found


def save(path: Path, rows: Sequence[Strip]) -> None:
    """Draws the strips below each other, a block for each model, and saves a picture."""
    from matplotlib.figure import Figure

    begins = [i for i, row in enumerate(rows) if i == 0 or row.model != rows[i - 1].model]
    heights = [1.25 if i in begins[1:] else 1.0 for i in range(len(rows))]
    tile = 0.5  # inches
    left = 2.1
    figure = Figure(figsize=(left + tile * COLUMNS, tile * sum(heights)), dpi=200)
    top, width = sum(heights), tile * COLUMNS / (left + tile * COLUMNS)
    at = 0.0
    for i, (row, height) in enumerate(zip(rows, heights, strict=True)):
        at += height
        axes = figure.add_axes((1 - width, (top - at) / top, width, 0.96 / top))
        picture = grids.grid(row.images, columns=COLUMNS, padding=1)
        axes.imshow(picture, aspect="auto", cmap="gray", interpolation="none")
        axes.set_axis_off()
        axes.text(-0.01, 0.5, row.what, transform=axes.transAxes, ha="right", va="center", size=8)
        if i in begins and row.model:
            name = row.model.replace(",rank=", ", rank ")
            axes.text(
                -left / (tile * COLUMNS), 0.5, name, transform=axes.transAxes, va="center", size=9,
                weight="bold",
            )  # fmt: skip
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.05)
