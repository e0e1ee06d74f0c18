"""Counts objects in samples of the embedded scenes: are they scenes of whole, separate objects?

    python -m experiments.results.scenes --workdir=runs/best_samples --samplers=prior,gaussian,flow

prints a row for held-out scenes, one for their reconstructions and one for the samples of each
sampler, and writes scenes.json, scenes.md and a grid of the last sampler's first 64 samples
(scenes.png) into the workdir.

An object is a region of even colour on the ground. A scene is *whole* if it has 1 to 3 objects, as
the data set has, and less than 3% of its pixels are neither ground nor within 2.5 pixels of one. On
held-out scenes the count equals the true one for 99%. Soft edges are no fault there, so they have a
column: pixels that are neither ground nor clearly object, for each that is clearly object.
"""

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, UInt8
from scipy import ndimage

from experiments import options, study
from svae_jax import image_files
from svae_jax.analysis import exploring, tables
from svae_jax.data.sources import shapes
from svae_jax.errors import UserError
from svae_jax.evaluation import estimates, grids
from svae_jax.files import os_errors_for_user

# Distances of RGB colours, each channel from 0 to 1. Shapes are at least MIN_CONTRAST = 0.45 from
# the ground and from each other.
_VIVID = 0.22  # from the ground: may be an object
_OFF_GROUND = 0.14  # from the ground: not ground
_SOFT, _CLEAR = 0.1, 0.3  # from the ground: between these, a soft edge or a faint stain
_EVEN = 0.16  # between neighbouring pixels of one object; less than across an edge
_MIN_PIXELS = 5
_EDGE = 2.5  # pixels: width of an edge, which belongs to its object
_MAX_STAINS = 0.03


class Count(NamedTuple):
    """What an image holds.

    Attributes:
        objects: regions of even colour on the ground.
        stains: the share of pixels that are neither ground nor near an object.
        softness: pixels between ground and object in colour, for each that is clearly object.
    """

    objects: int
    stains: float
    softness: float

    @property
    def is_whole(self) -> bool:
        """Whether it could be a scene of the data set."""
        return 1 <= self.objects <= shapes.MAX_SHAPES and self.stains < _MAX_STAINS


def count(image: UInt8[np.ndarray, "h w 3"]) -> Count:
    """Counts the objects of an image."""
    colour = image / 255.0
    contrast = np.linalg.norm(colour - ground(colour), axis=2)
    regions, num = ndimage.label((contrast > _VIVID) & (_steepness(colour) < _EVEN))
    sizes = np.bincount(regions.ravel(), minlength=num + 1)
    kept = np.flatnonzero(sizes >= _MIN_PIXELS)
    kept = kept[kept > 0]  # 0 is everything else
    elsewhere = ~np.isin(regions, kept)
    near = ndimage.distance_transform_edt(elsewhere) <= _EDGE if len(kept) else ~elsewhere
    stains = float(np.mean((contrast > _OFF_GROUND) & ~near))
    clear = np.sum(contrast >= _CLEAR)
    soft = np.sum((contrast > _SOFT) & (contrast < _CLEAR))
    return Count(len(kept), stains, float(soft / max(clear, 1)))


def ground(colour: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """The linear gradient of colour that most of the pixels at the image's border lie on.

    Weighted least squares, by turns with weights 1/distance, for the border's median and not its
    mean, since a few of its pixels may be of shapes.
    """
    height, width, _ = colour.shape
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    plane = np.stack([np.ones_like(rows), rows, columns], axis=-1)
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    weights, found = np.ones(border.sum()), colour
    for _ in range(8):
        root = np.sqrt(weights)[:, None]
        fit = np.linalg.lstsq(plane[border] * root, colour[border] * root, rcond=None)[0]
        found = plane @ fit
        weights = 1 / (np.linalg.norm((colour - found)[border], axis=1) + 0.02)
    return found


def _steepness(colour: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """The largest distance of a pixel's colour from those of its four neighbours."""
    padded = np.pad(colour, ((1, 1), (1, 1), (0, 0)), mode="edge")
    neighbours = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return np.max([np.linalg.norm(colour - other, axis=2) for other in neighbours], axis=0)


def summary(name: str, images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, Any]:
    """Shares of images that are whole and that have each number of objects; median softness."""
    found = [count(image) for image in images]
    whole = estimates.of_mean(100.0 * np.array([one.is_whole for one in found]))
    objects = np.array([one.objects for one in found])
    shares = {str(i): float(np.mean(objects == i)) for i in range(shapes.MAX_SHAPES + 1)}
    more = float(np.mean(objects > shapes.MAX_SHAPES))
    return {
        "images": name,
        "whole, %": whole._asdict(),
        "softness": float(np.median([one.softness for one in found])),
        "objects": {**shares, "more": more},
    }


def render(content: dict[str, Any]) -> str:
    """The table of `summary`, a row each."""
    rows = [
        {
            "images": row["images"],
            "whole scenes, %": tables.figure(row["whole, %"]),
            "softness, median": f"{row['softness']:.2f}",
            **{number: f"{share:.1%}" for number, share in row["objects"].items()},
        }
        for row in content["runs"]
    ]
    settings = content["settings"]
    text = (
        f"{settings['num']:,} images each, of the checkpoint of step {settings['step']:,}; to the "
        "right the shares of images with so many objects."
    )
    made = f"Made by `{settings['command']}`."
    return f"# Objects in samples\n\n{text}\n\n{tables.markdown(rows)}\n\n{made}\n"


def _define(values: flags.FlagValues) -> None:
    options.define_path("workdir", "directory of a run of configs/shapes.py", values)
    options.define_list("samplers", ["prior"], "samplers, fitted to the run", values)
    flags.DEFINE_integer("num", 2000, "images of each row", 1, flag_values=values)


def main(argv: Sequence[str]) -> None:
    """Counts, and writes the table.

    Raises:
        UserError: a mistake in the options, or a run of other images.
    """
    values = options.parse(argv, __doc__, _define)
    if not values.samplers:
        raise UserError("--samplers is empty: name one at least, such as prior")
    run = exploring.load(values.workdir)
    if run.config.dataset.name != shapes.SpatialShapes.name:
        raise UserError(f"--workdir={values.workdir} is not a run of the embedded scenes (shapes)")
    drawn = {name: run.sample(values.num, name) for name in values.samplers}
    held_out = run.images(f"test[:{values.num}]")
    sets = {"held-out scenes": held_out, "their reconstructions": run.reconstruct(held_out)}
    command = shlex.join(["python", "-m", "experiments.results.scenes", *argv])
    content = {
        "settings": {"command": command, "step": run.step, "num": values.num},
        "runs": [summary(name, run.display(found)) for name, found in {**sets, **drawn}.items()],
    }
    study.write(values.workdir / "scenes", content, render)
    last = run.display(drawn[values.samplers[-1]][:64])
    picture = values.workdir / "scenes.png"
    with os_errors_for_user(f"{picture} cannot be written"):
        image_files.save_picture(picture, grids.grid(last))


if __name__ == "__main__":
    options.run_command(main)
