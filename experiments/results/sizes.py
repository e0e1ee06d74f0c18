"""Draws what a sweep of latent sizes found: how large should a map be, and how many?

    python -m experiments.results.sizes --sweep=runs/latents/sweep.csv --out=sizes.png

reads the trials of `experiments.sweep --sweep=latents`. Left, the held-out ELBO against the number
of latents of an image, a line for each size of a map. Right, where each model lies between rate
(KL) and distortion (negative reconstruction term); grey lines join places of equal ELBO.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from absl import flags

from experiments import options
from svae_jax.errors import UserError
from svae_jax.files import os_errors_for_user

_NAMES = {"eval/elbo": "elbo", "eval/kl": "rate", "eval/reconstruction": "reconstruction"}


def _define(values: flags.FlagValues) -> None:
    options.define_path("sweep", "sweep.csv of --sweep=latents", values)
    options.define_path("out", "figure, such as sizes.png", values)


def main(argv: Sequence[str]) -> None:
    """Draws the figure.

    Raises:
        UserError: a mistake in the options, or a file that is not of such a sweep.
    """
    values = options.parse(argv, __doc__, _define)
    drawn = figure(read(values.sweep))
    with os_errors_for_user(f"--out={values.out} cannot be written"):
        drawn.savefig(values.out, dpi=200)
    print(f"written: {values.out}")


def read(path: Path) -> pd.DataFrame:
    """Models by their line, the posterior and size of a map, and number of latents.

    Of several models with as many latents, such as vectors with two decoders, it has the best.

    Raises:
        UserError: the file cannot be read, or is not of such a sweep.
    """
    with os_errors_for_user(f"--sweep={path} cannot be read"):
        rows = pd.read_csv(path)
    done = rows[rows.status == "done"].rename(columns=_NAMES)
    if done.empty:
        raise UserError(f"--sweep={path} has no finished trial of a sweep")
    try:
        size = done.d.map(lambda d: "1x1" if pd.isna(d) else f"{d:.0f}x{d:.0f}")
        found = done[[*_NAMES.values()]].assign(
            line=done.posterior + ", " + size,
            latents=done.C.fillna(done.N * done.d**2),
            distortion=-done.reconstruction,
        )
    except (AttributeError, KeyError):
        raise UserError(
            f"--sweep={path} is not of a sweep of d, N and C, such as latents"
        ) from None
    ordered = found.dropna(subset="elbo").sort_values("elbo")
    best = ordered.drop_duplicates(["line", "latents"], keep="last")
    return best.sort_values(["line", "latents"])


def figure(models: pd.DataFrame) -> Any:
    """The figure, of Matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for name, own in models.groupby("line"):
        style = {"color": "black", "linestyle": "--"} if name.startswith("vector") else {}
        for axes, x, y in ((left, "latents", "elbo"), (right, "rate", "distortion")):
            axes.plot(own[x], own[y], **{"marker": "o", "markersize": 4, "label": name, **style})
    left.set_xscale("log", base=2)
    left.set(xlabel="latents of an image", ylabel="held-out ELBO, nats")
    left.legend(fontsize="small")
    right.set(xlabel="rate: KL, nats", ylabel="distortion: negative reconstruction, nats")
    # Lines on which rate and distortion have equal sums, within the limits that are set.
    limits = right.get_xlim(), right.get_ylim()
    for total in MaxNLocator(12).tick_values(*map(sum, zip(*limits, strict=True))):
        heights = [total - rate for rate in limits[0]]
        right.plot(limits[0], heights, color="0.9", linewidth=0.8, zorder=0)
    right.set(xlim=limits[0], ylim=limits[1])
    return drawn


if __name__ == "__main__":
    options.run_command(main)
