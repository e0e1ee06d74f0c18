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
    """Draws the strips below each other, each with its name, and saves a picture."""
    from matplotlib.figure import Figure

    tile, left = 0.5, 2.1  # inches
    figure = Figure((left + tile * COLUMNS, tile * len(rows)), dpi=200, layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, row, before in zip(panels, rows, (None, *rows), strict=False):
        axes.imshow(grids.grid(row.images, columns=COLUMNS, padding=1), cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(row.what, rotation=0, ha="right", va="center", size=8)
        if row.model and (before is None or before.model != row.model):
            name = row.model.replace(",rank=", ", rank ")
            axes.set_title(name, loc="left", size=8, weight="bold", pad=2)
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.05)
