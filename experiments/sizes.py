"""Draws what a sweep of latent sizes found: how large should a map be, and how many?

    python -m experiments.sizes --sweep=runs/latents/sweep.csv --out=sizes.png

reads the trials of `experiments.sweep --sweep=latents`. Left, the held-out ELBO against the number
of latents of an image, a line for each size of a map. Right, where each model lies between rate
(KL) and distortion (negative reconstruction term); grey lines join places of equal ELBO.
"""

import collections
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.options import Parser, nonempty_path, run_command
from svae_jax.errors import UserError
from svae_jax.files import os_errors_for_user


class Point(NamedTuple):
    """A trained model.

    Attributes:
        num_latents: of an image.
        elbo: nats, as all that follow.
        kl: the rate.
        reconstruction: the negative of the distortion.
    """

    num_latents: int
    elbo: float
    kl: float
    reconstruction: float


def main(argv: Sequence[str]) -> None:
    """Draws the figure.

    Raises:
        UserError: a mistake in the options, or a file that is not of such a sweep.
    """
    parser = Parser("sizes", __doc__)
    parser.add_argument(
        "--sweep", type=nonempty_path, required=True, help="sweep.csv of --sweep=latents"
    )
    parser.add_argument(
        "--out", type=nonempty_path, required=True, help="figure, such as sizes.png"
    )
    options = parser.parse_args(argv)
    lines = read(options.sweep)
    with os_errors_for_user(f"--out={options.out} cannot be written"):
        figure(lines).savefig(options.out, dpi=200)
    print(f"written: {options.out}")


def read(path: Path) -> dict[str, list[Point]]:
    """Posterior and size of a map -> its models, by their number of latents.

    Raises:
        UserError: the file cannot be read, or is not of such a sweep.
    """
    with os_errors_for_user(f"--sweep={path} cannot be read"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
    lines: dict[str, dict[int, Point]] = collections.defaultdict(dict)
    for row in rows:
        if row.get("status") == "done":
            point = _point(path, row)
            name = f"{row['posterior']}, {row['d']}x{row['d']}" if row.get("d") else "vector, 1x1"
            # Of several models with as many latents, such as vectors with two decoders, the best.
            lines[name][point.num_latents] = max(
                point, lines[name].get(point.num_latents, point), key=lambda p: p.elbo
            )
    if not lines:
        raise UserError(f"--sweep={path} has no finished trial of a sweep")
    return {name: sorted(lines[name].values()) for name in sorted(lines)}


def _point(path: Path, row: Mapping[str, str]) -> Point:
    try:
        maps = int(row["C"] or int(row["N"]) * int(row["d"]) ** 2)
        elbo, kl, reconstruction = (
            float(row[f"eval/{name}"]) for name in ("elbo", "kl", "reconstruction")
        )
    except (KeyError, ValueError):
        raise UserError(
            f"--sweep={path} is not of a sweep of d, N and C, such as latents"
        ) from None
    return Point(maps, elbo, kl, reconstruction)


def figure(lines: Mapping[str, Sequence[Point]]) -> Any:
    """The figure, of Matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(drawn)
    left, right = drawn.subplots(1, 2)
    for at, (name, points) in enumerate(lines.items()):
        style = {"color": "black", "linestyle": "--"} if name.startswith("vector") else {}
        style = {"color": f"C{at}", "marker": "o", "markersize": 4, "label": name, **style}
        left.plot([p.num_latents for p in points], [p.elbo for p in points], **style)
        right.plot([p.kl for p in points], [-p.reconstruction for p in points], **style)
    left.set_xscale("log", base=2)
    left.set_xlabel("latents of an image")
    left.set_ylabel("held-out ELBO, nats")
    left.legend(fontsize="small")
    right.set_xlabel("rate: KL, nats")
    right.set_ylabel("distortion: negative reconstruction, nats")
    _equal_elbo(right)
    return drawn


def _equal_elbo(axes: Any) -> None:
    """Lines on which rate and distortion have equal sums, within the limits that are set."""
    from matplotlib.ticker import MaxNLocator

    width, height = axes.get_xlim(), axes.get_ylim()
    sums = MaxNLocator(12).tick_values(width[0] + height[0], width[1] + height[1])
    for total in sums:
        axes.plot(width, [total - rate for rate in width], color="0.9", linewidth=0.8, zorder=0)
    axes.set_xlim(width)
    axes.set_ylim(height)


if __name__ == "__main__":
    run_command(main)
