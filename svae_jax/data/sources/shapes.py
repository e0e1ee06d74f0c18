"""The embedded data set: a few coloured shapes on a shaded ground, drawn without a download.

It probes spatial latents: each object has a known place, size, angle, colour and depth.
"""

import colorsys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from jaxtyping import Float, UInt8
from PIL import Image

from svae_jax import terminal

SIZE = 32  # pixels along a side
MAX_SHAPES = 3
KINDS = ("disc", "square", "triangle")
SPLITS = {"train": 20_000, "test": 2_000}
MIN_CONTRAST = 0.45  # RGB distance of a shape's colour from the ground and the other shapes
MIN_VISIBLE = 0.6  # share of a shape's area that nearer shapes may not cover

Colour = Float[np.ndarray, "3"]
Coverage = Float[np.ndarray, "32 32"]

_X, _Y = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
_EDGES = {"square": 4, "triangle": 3}


def scene(split: str, index: int) -> tuple[UInt8[np.ndarray, "32 32 3"], dict[str, Any]]:
    """Draws image `index`, from 0, of `split`; the same arguments give the same image.

    Returns:
        The image `[32, 32, 3]` and its factors, as `SpatialShapes` describes them.
    """
    rng = np.random.default_rng((list(SPLITS).index(split), index))
    count = 1 + int(rng.random() * MAX_SHAPES)
    ground, colours = _colours(rng, count)
    ground_angle = 2 * np.pi * rng.random()
    shapes, coverages = _layout(rng, count)

    image = _shade(ground, ground_angle)
    for coverage, colour in zip(coverages, colours, strict=True):  # the nearest comes last
        image += coverage[..., None] * (colour - image)
    factors = {
        "count": count,
        "kind": _pad([shape["kind"] for shape in shapes], -1, np.int64),
        "centre": _pad([shape["centre"] for shape in shapes], [0, 0], np.float32),
        "radius": _pad([shape["radius"] for shape in shapes], 0, np.float32),
        "angle": _pad([shape["angle"] for shape in shapes], 0, np.float32),
        "colour": _pad([_quantise(colour) for colour in colours], [0, 0, 0], np.uint8),
        "ground_colours": _quantise(ground),
        "ground_angle": np.float32(ground_angle),
    }
    return _quantise(image), factors


def coverage(kind: str, centre: np.ndarray, radius: float, angle: float) -> Coverage:
    """Returns the share of each pixel, `[32, 32]`, that a shape covers, by distance to its edges.

    Args:
        kind: One of `KINDS`.
        centre: Centroid `[2]`, as (x, y) in pixels from the upper left corner.
        radius: Radius, in pixels, of the disc of the same area.
        angle: Clockwise rotation in radians.
    """
    x, y = _X - centre[0], _Y - centre[1]
    if kind == "disc":
        return np.clip(0.5 + radius - np.hypot(x, y), 0, 1)
    edges = _EDGES[kind]
    inradius = radius * np.sqrt(np.pi / (edges * np.tan(np.pi / edges)))
    normals = angle + 2 * np.pi * np.arange(edges) / edges
    inside = [np.clip(0.5 + inradius - x * np.cos(a) - y * np.sin(a), 0, 1) for a in normals]
    return np.prod(inside, axis=0)


def _colours(rng: np.random.Generator, count: int) -> tuple[np.ndarray, list[Colour]]:
    """Draws a ground `[2, 3]` of two muted shades and a vivid colour for each shape."""
    hue, saturation, dark, rise = rng.random(4)
    dark, rise = 0.1 + 0.5 * dark, 0.15 + 0.25 * rise
    shades = (dark, dark + rise) if rng.random() < 0.5 else (dark + rise, dark)
    ground = np.array([colorsys.hsv_to_rgb(hue, 0.5 * saturation, shade) for shade in shades])
    taken = np.linspace(ground[0], ground[1], 5)
    while len(taken) < 5 + count:
        hue, saturation, value = rng.random(3)
        rgb = colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.6 + 0.4 * value)
        if np.linalg.norm(taken - rgb, axis=1).min() >= MIN_CONTRAST:
            taken = np.vstack([taken, rgb])
    return ground, list(taken[5:])


def _layout(rng: np.random.Generator, count: int) -> tuple[list[dict[str, Any]], list[Coverage]]:
    """Draws shapes, the furthest first, until each is visible by at least `MIN_VISIBLE`."""
    while True:
        shapes = [_shape(rng) for _ in range(count)]
        coverages = [
            coverage(KINDS[s["kind"]], s["centre"], s["radius"], s["angle"]) for s in shapes
        ]
        uncovered = np.ones((SIZE, SIZE))
        visible = []
        for mask in reversed(coverages):
            visible.append((mask * uncovered).sum() / mask.sum())
            uncovered = uncovered * (1 - mask)
        if min(visible) >= MIN_VISIBLE:
            return shapes, coverages


def _shape(rng: np.random.Generator) -> dict[str, Any]:
    kind, radius, x, y, angle = rng.random(5)
    kind, radius = int(kind * len(KINDS)), 3.5 + 4 * radius
    turn = 2 * np.pi / _EDGES[KINDS[kind]] if KINDS[kind] in _EDGES else 0.0
    centre = radius + (SIZE - 2 * radius) * np.array([x, y])
    return {"kind": kind, "centre": centre, "radius": radius, "angle": turn * angle}


def _shade(ground: np.ndarray, angle: float) -> Float[np.ndarray, "32 32 3"]:
    """Returns a linear gradient from one side or corner of the image to the opposite one."""
    direction = np.array([np.cos(angle), np.sin(angle)])
    along = (_X - SIZE / 2) * direction[0] + (_Y - SIZE / 2) * direction[1]
    share = 0.5 + along / (SIZE * np.abs(direction).sum())
    return ground[0] + share[..., None] * (ground[1] - ground[0])


def _quantise(colour: np.ndarray) -> np.ndarray:
    return np.round(255 * colour).astype(np.uint8)


def _pad(rows: list[Any], filler: Any, dtype: Any) -> np.ndarray:
    return np.array(rows + [filler] * (MAX_SHAPES - len(rows)), dtype)


class SpatialShapes(tfds.core.GeneratorBasedBuilder):
    """One to three anti-aliased shapes on a shaded ground, and their factors.

    Lengths are pixels from the upper left corner, x to the right and y down; angles are radians,
    clockwise. Shapes are in depth order, the furthest first; rows from `count` on are padding.

    - `count`: number of shapes, 1 to 3.
    - `kind` `[3]`: 0 disc, 1 square, 2 triangle; -1 is padding.
    - `centre` `[3, 2]`: the centroid's (x, y), at least one `radius` from the border.
    - `radius` `[3]`: of the disc of the same area, 3.5 to 7.5.
    - `angle` `[3]`: of the normal of one edge against x: 0 for a disc, below π/2 for a square,
      below 2π/3 for a triangle.
    - `colour` `[3, 3]`: RGB, 0 to 255.
    - `ground_colours` `[2, 3]`: RGB at the two ends of the gradient.
    - `ground_angle`: the direction from the first to the second, 0 to 2π.
    """

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        tensor = tfds.features.Tensor
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
            "count": tensor(shape=(), dtype=np.int64),
            "kind": tensor(shape=(MAX_SHAPES,), dtype=np.int64),
            "centre": tensor(shape=(MAX_SHAPES, 2), dtype=np.float32),
            "radius": tensor(shape=(MAX_SHAPES,), dtype=np.float32),
            "angle": tensor(shape=(MAX_SHAPES,), dtype=np.float32),
            "colour": tensor(shape=(MAX_SHAPES, 3), dtype=np.uint8),
            "ground_colours": tensor(shape=(2, 3), dtype=np.uint8),
            "ground_angle": tensor(shape=(), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the order on disk is the order of the indices
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        stream = terminal.stderr()
        description = f"drawing shapes {split}"
        for index in tqdm.trange(SPLITS[split], desc=description, disable=None, file=stream):
            image, factors = scene(split, index)
            # As Pillow images: arrays would be encoded by TensorFlow, three times slower.
            yield index, {"image": Image.fromarray(image), **factors}
