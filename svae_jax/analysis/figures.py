"""Figures of what `exploring` computes: each call returns a Matplotlib figure.

Images are uint8 or floats in [-1, 1], `[height, width, channels]`, or many of them; `run.display`
makes such pictures of images in other units. Figures are as
wide as a page or a column of it, with fonts of 8 points and colours that the colour-blind can tell
apart; nothing of Matplotlib's own settings is changed. In a notebook, `%matplotlib inline` shows
them.

    figures.edits(a, b, run.edit(a, b, run.cell(0, 2)), run.cell(0, 2)).savefig("edit.pdf")
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from svae_jax.analysis.exploring import KLMap, locality
from svae_jax.analysis.exploring.filling import Filled
from svae_jax.analysis.exploring.locality import Locality
from svae_jax.errors import UserError
from svae_jax.evaluation import grids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 5.5  # inches: the text of a page
# Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MOST_MARKED = 12  # points of a curve that are marked one by one
_STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "image.interpolation": "nearest",
    "image.cmap": "magma",  # even steps of lightness, so that it reads in grey too
}


def images(pictures: Any, columns: int | None = None) -> "Figure":
    """Images in a grid."""
    grid = grids.grid(pictures, columns, min_tile=1)
    with _figure(WIDTH, WIDTH * grid.shape[0] / grid.shape[1]) as figure:
        _show(figure.add_subplot(), _batch(grid)[0])
    return figure


def rows(pictures: Mapping[str, Any], titles: Sequence[str] = ()) -> "Figure":
    """Rows of images, each with its name: originals and reconstructions, or samples by sampler.

    Args:
        pictures: as many images in each row.
        titles: above the columns, if given.
    """
    pictures = {name: _batch(row) for name, row in pictures.items()}
    columns = max(len(row) for row in pictures.values())
    with _figure(WIDTH, WIDTH / columns * len(pictures) + 0.2 * bool(titles)) as figure:
        axes = figure.subplots(len(pictures), columns, squeeze=False)
        for line, (name, row) in zip(axes, pictures.items(), strict=True):
            for axis in line[len(row) :]:
                axis.set_axis_off()
            for axis, image in zip(line, row, strict=False):
                _show(axis, image)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, title in zip(axes[0], titles, strict=False):
            axis.set_title(title)
    return figure


def reconstructions(originals: Any, reconstructed: Any) -> "Figure":
    """Originals above their reconstructions."""
    return rows({"image": originals, "reconstruction": reconstructed})


def traversal(paths: Mapping[str, Any], values: Sequence[float]) -> "Figure":
    """Rows of images of `Run.traverse`, each with its name, under their values."""
    return rows(paths, [f"{value:+.2g}" for value in values])


def edits(a: Any, b: Any, changed: Any, where: Bool[np.ndarray, "h w"]) -> "Figure":
    """Images a, images b, and a with cells of b; these are framed in the last two.

    Args:
        a: images.
        b: as many, or one.
        changed: from `Run.edit`.
        where: the cells that were taken.
    """
    a, b, changed = (_batch(pictures) for pictures in (a, b, changed))
    b = np.broadcast_to(b, a.shape)
    with _figure(WIDTH * 0.6, WIDTH * 0.2 * len(a) + 0.2) as figure:
        axes = figure.subplots(len(a), 3, squeeze=False)
        for line, *pictures in zip(axes, a, b, changed, strict=True):
            for axis, picture in zip(line, pictures, strict=True):
                _show(axis, picture)
            for axis in line[1:]:
                _frame(axis, where, a.shape[1:3])
        for axis, title in zip(axes[0], ("A", "B", "A with cells of B"), strict=True):
            axis.set_title(title)
    return figure


def fillings(
    image: Any, mask: Bool[np.ndarray, "height width"], filled: Filled, shown: int = 5
) -> "Figure":
    """An image, the image with its hole, the conditional mean, and draws, in one row.

    Visible pixels are the image's own; those under the mask are filled in.

    Args:
        image: one image.
        mask: True where pixels are hidden.
        filled: pictures, from `Run.fill`.
        shown: how many of the draws.
    """
    original, hidden = _batch(image), mask[..., None]
    found = np.concatenate([_batch(filled.mean), _batch(filled.images)[:shown]])
    row = [*original, *np.where(hidden, 0.0, original), *np.where(hidden, found, original)]
    titles = ["image", "hidden", "mean", *(f"draw {i + 1}" for i in range(len(found) - 1))]
    return rows({"": np.stack(row)}, titles)


def reach(found: Locality) -> "Figure":
    """The energy of each cell over the image, with the cell's own patch framed.

    Each map has its own scale, from 0 to its largest value.
    """
    h, w, *image_shape = found.energy.shape
    with _figure(WIDTH * 0.6, WIDTH * 0.6 * h / w + 0.3) as figure:
        axes = figure.subplots(h, w, squeeze=False)
        for i, j in np.ndindex(h, w):
            _show(axes[i, j], found.energy[i, j], vmin=0)
            mask = np.zeros((h, w), bool)
            mask[i, j] = True
            _frame(axes[i, j], mask, (image_shape[0], image_shape[1]), colour="white")
        figure.suptitle(
            f"energy in the own patch {found.own_share:.0%} (even: {found.uniform_own_share:.0%})\n"
            f"spread {found.spread:.1f} px (even: {found.uniform_spread:.1f})",
            fontsize=8,
        )
    return figure


def kl_maps(pictures: Any, found: KLMap) -> "Figure":
    """Images above the nats of their latents' locations, on one scale."""
    shown = _batch(pictures)
    with _figure(WIDTH, 2 * WIDTH / len(shown) * 0.92) as figure:
        axes = figure.subplots(2, len(shown), squeeze=False)
        top = float(found.over_image.max())
        for above, below, image, nats in zip(*axes, shown, found.over_image, strict=True):
            _show(above, image)
            heat = _show(below, nats, vmin=0, vmax=top)
        figure.colorbar(heat, ax=axes, label="KL, nats a location", shrink=0.8, pad=0.02)
    return figure


def curves(
    metrics: Mapping[str, Sequence[Mapping[str, Any]]], name: str, label: str = ""
) -> "Figure":
    """One metric of several runs over the training steps.

    Args:
        metrics: run -> the rows of its `metrics.jsonl`.
        name: such as "eval/elbo".
        label: of the axis; the name by default.
    """
    with _figure(WIDTH * 0.6, WIDTH * 0.4) as figure:
        axis = figure.add_subplot()
        for i, (run, found) in enumerate(metrics.items()):
            points = [(row["step"], row[name]) for row in found if row.get(name) is not None]
            steps, values = np.array(points, float).reshape(-1, 2).T
            marker = "." if len(steps) <= _MOST_MARKED else None
            axis.plot(steps, values, label=run, color=COLOURS[i % len(COLOURS)], marker=marker)
        axis.set(xlabel="training steps", ylabel=label or name)
        if len(metrics) > 1:
            axis.legend()
    return figure


def lines(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Sequence[tuple[tuple[str, str], tuple[str, str]]],
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """Panels with a logarithmic x, each with a line for each series.

    Args:
        series: name -> its points, in order.
        panels: of each the name of a value of the points and the label of its axis, for x and y.
        levels: name of a series -> a dashed line across all panels, in the colour of the series.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    with _figure(WIDTH, WIDTH / len(panels) * 0.8) as figure:
        for axis, (x, y) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for i, (name, points) in enumerate(series.items()):
                colour = COLOURS[i % len(COLOURS)]
                values = [[point[key] for point in points] for key in (x[0], y[0])]
                axis.plot(*values, label=name, color=colour, marker=".")
                if levels and name in levels:
                    axis.axhline(levels[name], color=colour, linestyle="--", linewidth=0.8)
            axis.set(xlabel=x[1], ylabel=y[1], xscale="log")
            low, high = axis.get_xlim()
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
            axis.xaxis.set_major_formatter("{x:,g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


@contextlib.contextmanager
def _figure(width: float, height: float) -> "Iterator[Figure]":
    """A figure of this size in inches; what is drawn within the block has the style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _show(axis: Any, picture: Any, **scale: Any) -> Any:
    """One picture, or one map of numbers `[h, w]`, without ticks."""
    if picture.ndim == 3:
        picture = (picture + 1) / 2
        picture = np.repeat(picture, 3, -1) if picture.shape[-1] == 1 else picture
        picture = picture.clip(0, 1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis.imshow(picture, **scale)


def _frame(
    axis: Any, where: Bool[np.ndarray, "h w"], shape: tuple[int, int], colour: str = "black"
) -> None:
    """Draws the border of the patches of these cells."""
    owned = np.pad(where[np.ix_(*locality.owners(where.shape, shape))], 1)
    # Edges between pixels that are owned and those that are not, or lie outside; NaN lifts the pen.
    lines = [
        ((x - 1.5, x - 0.5, np.nan), (y - 0.5, y - 0.5, np.nan))
        for y, x in np.argwhere(owned[1:] != owned[:-1])
    ] + [
        ((x - 0.5, x - 0.5, np.nan), (y - 1.5, y - 0.5, np.nan))
        for y, x in np.argwhere(owned[:, 1:] != owned[:, :-1])
    ]
    x, y = np.array(lines).transpose(1, 0, 2).reshape(2, -1)
    for line_colour, width in (("white", 2.0), (colour, 1.0)):
        axis.plot(x, y, color=line_colour, linewidth=width, solid_capstyle="projecting")


def _batch(pictures: Any) -> Float[np.ndarray, "b height width c"]:
    """One image or many as floats in [-1, 1].

    Raises:
        UserError: another dtype, range or number of channels.
    """
    array = np.asarray(pictures)
    is_picture = array.dtype == np.uint8 or (
        np.issubdtype(array.dtype, np.floating) and np.abs(array).max() <= 1 + 1e-3
    )
    if not is_picture or array.shape[-1] not in (1, 3):
        raise UserError(
            f"figures: {array.dtype} of shape {list(array.shape)} is not a picture; figures show "
            "uint8, or floats in [-1, 1], of 1 or 3 channels: give run.display(images)"
        )
    array = array / 127.5 - 1 if array.dtype == np.uint8 else array
    return array.reshape(-1, *array.shape[-3:])
