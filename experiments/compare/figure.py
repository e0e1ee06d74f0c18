"""The picture of a comparison, after the paper's Figures 2 and 3: reconstructions and samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from svae_jax import pixels as pixel_lib
from svae_jax.analysis import drawing, fitted, trained
from svae_jax.evaluation import grids, steps

Pixels = UInt8[np.ndarray, "n h w c"]

COLUMNS = 16
_SHOWN = ("prior", "flow", "mixture", "gaussian")  # of these, the prior and the next that is fitted


def strips(
    directories: Mapping[str, Path], samplers: Sequence[str], split: str, seed: int = 0
) -> dict[str, Pixels]:
    """Rows of images by name: held-out ones, and of each model reconstructions and samples.

    Args:
        directories: model -> the workdir of a run.
        samplers: those that are fitted to every run; shown are the prior and the best of the rest.
        split: the held-out images, of which the first are shown; empty: the runs' own.
        seed: of everything drawn.
    """
    found: dict[str, Pixels] = {}
    key = jax.random.key(seed)
    for model, directory in directories.items():
        run = trained.load(directory)
        originals = np.asarray(run.images(split)[:COLUMNS])
        held_out = pixel_lib.to_uint8(run.pixels.to_float(originals))
        found.setdefault("held out", np.asarray(held_out))
        images = steps.reconstruct(run.model, run.variables, key, originals)
        found[f"{model}\nreconstructed"] = np.asarray(pixel_lib.to_uint8(images))
        for name in [name for name in _SHOWN if name in samplers][:2]:
            sampler = fitted.load_sampler(directory, name, run)
            drawn = np.concatenate(list(drawing.draw(run, sampler, key, COLUMNS)))
            found[f"{model}\nsamples, {name}"] = np.asarray(pixel_lib.to_uint8(drawn))
    return found


def save(path: Path, rows: Mapping[str, Pixels]) -> None:
    """Draws the strips below each other, each with its name, and saves a picture."""
    from matplotlib.figure import Figure

    tile, left = 0.5, 2.1  # inches
    figure = Figure((left + tile * COLUMNS, tile * len(rows)), dpi=200, layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (name, images) in zip(panels, rows.items(), strict=True):
        axes.imshow(grids.grid(images, columns=COLUMNS, padding=1), cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", size=8)
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.05)
