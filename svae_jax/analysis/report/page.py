"""The page: HTML, styles and pictures in one file that loads nothing."""

import base64
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from svae_jax import files, seeds
from svae_jax.analysis import exploring, figures, tables
from svae_jax.analysis.exploring import Run
from svae_jax.analysis.report import content
from svae_jax.analysis.report.content import Content, Shown
from svae_jax.devices import runtime
from svae_jax.errors import UserError

_CHARTS = (
    ("eval/elbo", "Held-out ELBO, nats (higher is better)"),
    ("train/loss", "Training loss, nats"),
    ("train/reconstruction", "log p(x|z) in training, nats"),
    ("train/kl", "KL in training, nats"),
)
_SECTIONS = (
    ("samples", "Samples", "Images of latents drawn from each sampler that is fitted to the run."),
    ("reconstructions", "Reconstructions", "Held-out images, each above its reconstruction from "
     "the posterior's mean."),
    ("edits", "Edits", "Two images, and the first with latent cells of the second. Frames show the "
     "patches of these cells."),
    ("interpolation", "Interpolation", "From one image's latent to another's, in a straight line."),
    ("directions", "Directions", "One image's latent, moved along the directions in which the "
     "latents of held-out images differ most, by so many standard deviations."),
    ("locality", "Locality", "How far each latent cell reaches: the energy of the decoder's "
     "Jacobian for that cell over the image, each on its own scale. The cell's own patch is "
     "framed."),
    ("kl", "KL by location", "Images, and the nats that each location of their latents costs."),
)  # fmt: skip


@runtime.own_numerics()
def write(
    runs: Sequence[str | Path | Run], out: str | Path, seed: int = 0, data_dir: str | Path = ""
) -> Path:
    """Writes the report of some runs, which may still be training: they are only read.

    Args:
        runs: workdirs; or runs that are loaded, such as those of networks of your own.
        out: an HTML file that does not exist.
        seed: of the samples.
        data_dir: where the data set of the workdirs is now, if it has moved.

    Raises:
        UserError: a mistake that the user can correct; nothing is overwritten.
    """
    seeds.check(seed)
    target = files.user_path(out, "--out")
    if target.suffix not in (".html", ".htm"):
        raise UserError(f"--out={out} must end in .html")
    with files.os_errors_for_user(f"--out={out} cannot be written"):
        if target.exists():
            raise UserError(f"--out={out} exists; remove it, or choose another --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()  # it must not fail after the work
    loaded = [
        run if isinstance(run, Run) else exploring.load(run, data_dir=data_dir) for run in runs
    ]
    if not loaded:
        raise UserError("--workdir names no run")
    labels = _labels([run.directory for run in loaded])
    found = [content.of_run(*pair, seed) for pair in zip(loaded, labels, strict=True)]
    with (
        files.os_errors_for_user(f"--out={out} cannot be written"),
        files.replacing(target) as file,
    ):
        file.write(html(found).encode())
    return target


def html(runs: Sequence[Content]) -> str:
    """The page of some runs."""
    loader = jinja2.PackageLoader(__package__, "")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["png"] = _data_url
    config = _by_name([run.config for run in runs])
    evaluations = [run.evaluation | {"workdir": run.label} for run in runs if run.evaluation]
    return environment.get_template("page.html").render(
        runs=runs,
        names=", ".join(run.label for run in runs),
        differing_data=len({run.data for run in runs}) > 1,
        head=["", *(run.label for run in runs)],
        facts=_by_name([run.facts for run in runs]),
        config=config,
        differing=[line for line in config if len(set(line[1:])) > 1],
        charts=list(_charts(runs)),
        sections=[(title, text, _rows(runs, key)) for key, title, text in _SECTIONS],
        evaluations=[
            ("", _table(tables.runs(evaluations))),
            ("Samples", _table(tables.sets(evaluations))),
        ]
        if evaluations
        else [],
        notes=tables.notes(evaluations) if evaluations else "",
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """The directories' names where these differ, else their paths, else numbered paths."""
    names, whole = [path.resolve().name for path in paths], [str(path) for path in paths]
    for labels in (names, whole):
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path} ({i})" for i, path in enumerate(whole, 1)]


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _by_name(columns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each name that occurs a line: the name, and its value in each column."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(_value(column.get(name)) for column in columns)] for name in names]


def _value(value: object) -> str:
    return "-" if value in ("", None) else str(value)


def _charts(runs: Sequence[Content]) -> Iterator[tuple[str, Shown]]:
    """Titles and charts of the metrics that some run has."""
    for name, title in _CHARTS:
        found = {run.label: run.metrics for run in runs}
        if any(row.get(name) is not None for rows in found.values() for row in rows):
            chart = content.png(figures.curves(found, name, "nats"))
            yield title, Shown(chart, f"{title}, of each run")


def _rows(runs: Sequence[Content], section: str) -> dict[str, list[content.Row]]:
    """For each row of a section, the picture of each run."""
    missing = "not fitted" if section == "samples" else "-"
    names = dict.fromkeys(row for run in runs for row in run.pictures[section])
    return {row: [run.pictures[section].get(row, missing) for run in runs] for row in names}


def _table(records: Sequence[tables.Record]) -> tuple[list[str], list[list[str]]]:
    """Column names and lines."""
    columns = list(dict.fromkeys(column for record in records for column in record))
    return columns, [[record.get(column, "") for column in columns] for record in records]
