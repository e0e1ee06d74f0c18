"""The page: HTML, styles and pictures in one file that loads nothing."""

import base64
import importlib.resources
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from svae_jax import files
from svae_jax.analysis import exploring, tables
from svae_jax.analysis.exploring import Run
from svae_jax.analysis.report import content, curves
from svae_jax.analysis.report.content import Content, Shown
from svae_jax.analysis.report.markup import Markup, tag, void
from svae_jax.errors import UserError
from svae_jax.run import image_files

# Whatever the page holds, a browser loads nothing for it and runs nothing in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

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
    ("edits", "Edits", "Left: the reconstructions of two images, A and B. Right: A, with the one "
     "latent cell at that place (framed) taken from B."),
    ("interpolation", "Interpolation", "From one image's latent to another's, in a straight line."),
    ("directions", "Directions", "One image's latent, moved along the directions in which the "
     "latents of held-out images differ most: from -3 to 3 standard deviations, a line each."),
    ("locality", "Locality", "How far each latent cell reaches: the energy of the decoder's "
     "Jacobian for that cell over the image, each on its own scale. The cell's own patch is "
     "framed."),
    ("kl", "KL by location", "Images, and the nats that each location of their latents costs."),
)  # fmt: skip


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
    names = ", ".join(run.label for run in runs)
    body = [
        tag("header", tag("h1", names), tag("p", "Trained runs of svae_jax")),
        tag("main", _overview(runs), _training(runs), *_pictures(runs), _evaluations(runs)),
    ]
    head = [
        void("meta", charset="utf-8"),
        void("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", name="color-scheme", content="light dark"),
        tag("title", f"{names} · svae_jax"),
        tag("style", Markup(_style())),
    ]
    kind = "one" if len(runs) == 1 else "many"
    page = tag("html", tag("head", *head), tag("body", *body, class_=kind), lang="en")
    return f"<!doctype html>\n{page}\n"


def _labels(paths: Sequence[Path]) -> list[str]:
    """The directories' names where these differ, else their paths."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _style() -> str:
    return importlib.resources.files(__package__).joinpath("style.css").read_text()


def _overview(runs: Sequence[Content]) -> Markup:
    notes = []
    if len({run.data for run in runs}) > 1:
        shown = ", ".join(f"{run.label} ({run.data})" for run in runs)
        notes = [tag("p", f"The runs are of different images: {shown}. Their nats and distances do "
                     "not compare.", class_="note")]  # fmt: skip
    facts = list(dict.fromkeys(name for run in runs for name in run.facts))
    table = _table(
        "facts",
        ["", *(run.label for run in runs)],
        [[name, *(run.facts.get(name, "-") for run in runs)] for name in facts],
        of_runs=True,
    )
    fields = list(dict.fromkeys(name for run in runs for name in run.config))
    values = {name: [_value(run.config.get(name)) for run in runs] for name in fields}
    differing = [name for name in fields if len(set(values[name])) > 1]

    def configuration(names: Sequence[str]) -> Markup:
        rows = [[name, *values[name]] for name in names]
        return _table("configuration", ["", *(run.label for run in runs)], rows, of_runs=True)

    difference = []
    if differing:
        title = tag("h3", "Where the configurations differ")
        difference = [tag("div", title, configuration(differing))]
    everything = tag("details", tag("summary", "Configuration"), configuration(fields))
    first = tag("div", table, *difference, class_="runs")
    return tag("section", tag("h2", "Runs"), *notes, first, everything)


def _value(value: object) -> str:
    return "-" if value in ("", None) else str(value)


def _training(runs: Sequence[Content]) -> Markup:
    metrics = [run.metrics for run in runs]
    charts = [(curves.chart(metrics, name, title), title) for name, title in _CHARTS]
    figures = [tag("figure", tag("figcaption", title), chart) for chart, title in charts if chart]
    if not figures:
        return Markup()
    legend = tag("p", *_names(runs), class_="legend")
    return tag("section", tag("h2", "Training"), legend, tag("div", *figures, class_="charts"))


def _pictures(runs: Sequence[Content]) -> Iterable[Markup]:
    for key, title, text in _SECTIONS:
        parts = [tag("h2", title), tag("p", text)]
        for row in dict.fromkeys(row for run in runs for row in run.pictures[key]):
            if row:
                parts += [tag("h3", row)]
            missing = "not fitted" if key == "samples" else "-"
            shown = [run.pictures[key].get(row, missing) for run in runs]
            widest = max(
                (cell.picture.shape[1] for cell in shown if isinstance(cell, Shown)), default=1
            )
            names = [[tag("figcaption", name)] for name in _names(runs)] or [[]]
            cells = [_figure(*pair, widest) for pair in zip(names, shown, strict=True)]
            parts += [tag("div", *cells, class_="runs")]
        yield tag("section", *parts)


def _figure(name: Sequence[Markup], shown: Shown | str, widest: int) -> Markup:
    """A run's picture in a row, whose widest picture fills its place: all have one scale."""
    if isinstance(shown, str):
        return tag("figure", *name, tag("p", shown))
    data = base64.b64encode(image_files.png(shown.picture)).decode()
    height, width = shown.picture.shape[:2]
    image = void(
        "img",
        src=f"data:image/png;base64,{data}",
        alt=shown.alt,
        width=str(width),
        height=str(height),
        style=f"width:{width / widest:.1%}",
    )
    # Below the picture: captions of different length above it would set a row askew.
    caption = [tag("p", shown.caption)] if shown.caption else []
    return tag("figure", *name, tag("div", image, class_="picture"), *caption)


def _names(runs: Sequence[Content]) -> list[Markup]:
    """The runs' names with their colours; none where there is one run."""

    def name(index: int, label: str) -> Markup:
        line = tag("path", d="M1 5L25 5")
        kind = f"swatch curve run-{index}"
        swatch = tag("svg", line, viewBox="0 0 26 10", aria_hidden="true", class_=kind)
        return tag("span", swatch, label, class_="name")

    return [name(i, run.label) for i, run in enumerate(runs)] if len(runs) > 1 else []


def _evaluations(runs: Sequence[Content]) -> Markup:
    results = [run.evaluation | {"workdir": run.label} for run in runs if run.evaluation]
    if not results:
        return Markup()
    bodies = [
        _records("evaluation", tables.runs(results)),
        tag("h3", "Samples"),
        _records("evaluation of samples", tables.sets(results)),
    ]
    notes = tag("p", tables.notes(results), class_="lines")
    return tag("section", tag("h2", "Evaluation"), *bodies, notes)


def _records(name: str, records: Sequence[Mapping[str, str]]) -> Markup:
    columns = list(dict.fromkeys(column for record in records for column in record))
    return _table(
        name, columns, [[record.get(column, "") for column in columns] for record in records]
    )


def _table(
    name: str, head: Sequence[str], rows: Sequence[Sequence[str]], of_runs: bool = False
) -> Markup:
    """A table that scrolls within itself where it is wide; the first cell of a row names it.

    With `of_runs`, each column but the first is of one run.
    """
    heads = [tag("th", cell, scope="col") for cell in head]
    if of_runs:
        heads[1:] = [
            tag("th", cell, scope="col", class_=f"run-{i}") for i, cell in enumerate(head[1:])
        ]
    lines = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    kind = "table of-runs" if of_runs else "table"
    return tag("div", table, class_=kind, tabindex="0", role="region", aria_label=name)
