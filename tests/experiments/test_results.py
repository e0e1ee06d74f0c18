"""What is committed under experiments/results: every table is made of the numbers beside it."""

import csv
import json
import math
import pathlib
import re

import pytest

from experiments import rank
from experiments.compare import summary, tables
from experiments.sweep import outcomes, report
from experiments.sweep.trial import Trial
from svae_jax.analysis import tables as evaluation_tables

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
RENDER = {
    "experiments.compare": tables.render,
    "experiments.rank": rank.render,
    "svae_jax.evaluate": lambda content: evaluation_tables.evaluations(content["runs"]) + "\n",
}


def numbers(content):
    """All floating-point numbers in a nested structure."""
    if isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from numbers(item)
    elif isinstance(content, float):
        yield content


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*.json")), ids=lambda p: str(p.relative_to(RESULTS))
)
def test_the_tables_are_those_of_their_numbers(path):
    content = json.loads(path.read_text())
    (render,) = (r for name, r in RENDER.items() if name in content["settings"]["command"])
    assert path.with_suffix(".md").read_text() == render(content)
    assert all(math.isfinite(number) for number in numbers(content))
    assert content["runs"]


def outcome(row):
    """What a line of `sweep.csv` was made of."""
    columns = list(row)
    swept = columns[columns.index("status") + 1 : columns.index("step")]
    measured = columns[columns.index("step") + 1 : columns.index("images_per_second")]
    overrides = {name: row[name] for name in swept if row[name]}
    return outcomes.Outcome(
        Trial(row["trial"], overrides, (), pathlib.Path(row["workdir"])),
        row["status"],
        int(row["step"]) if row["step"] else None,
        {name: float(row[name]) for name in measured if row[name]},
        float(row["images_per_second"]) if row["images_per_second"] else None,
        int(row["num_parameters"]) if row["num_parameters"] else None,
        row["reason"],
    )


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("sweep.csv")), ids=lambda path: path.parent.name
)
def test_the_table_of_a_sweep_is_that_of_its_trials(path, tmp_path):
    pytest.importorskip("matplotlib")  # without it, the table has no picture
    with path.open() as file:
        found = [outcome(row) for row in csv.DictReader(file)]
    text = path.with_suffix(".md").read_text()
    title = text.splitlines()[0].removeprefix("# Sweep ")
    report.write(tmp_path, title, found, outcomes.ELBO)
    assert (tmp_path / "sweep.md").read_text() == text


@pytest.mark.parametrize("page", ["README.md", "experiments/results/README.md"])
def test_the_table_on_a_page_is_that_of_the_comparison(page):
    content = json.loads((RESULTS / "cifar10" / "comparison.json").read_text())
    models = tables.by_model(content, "elbo")
    latents = {run["model"]: run["latent"] for run in content["runs"]}
    lines = (RESULTS.parents[1] / page).read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    (start,) = (at for at, row in enumerate(rows) if row[:2] == ["model", "latent"])
    names = rows[start][2:]
    shown = rows[start + 2 : start + 2 + len(models)]
    assert [row[0].strip("`") for row in shown] == list(models)
    for (model, latent, *cells), seeds in zip(shown, models.values(), strict=True):
        spreads = summary.over_seeds(list(seeds.values()))
        expected = [tables.mean_and_sd(spreads[name]) for name in names]
        assert [cell.strip("*") for cell in cells] == expected
        assert latent == latents[model.strip("`")]


def test_the_distances_on_the_page_are_those_of_the_evaluations():
    runs = json.loads((RESULTS / "cifar10_samples" / "evaluations.json").read_text())["runs"]
    known = {
        evaluation_tables.figure(run["samples"]["gaussian"]["pixels"]["figures"]["swd_mean"])
        for run in runs
    }
    text = (RESULTS / "README.md").read_text()
    _, _, table = text.partition("| latents an image |")
    shown = re.findall(r"0\.\d+ ± 0\.\d+", table.partition("\n\n")[0])
    assert len(shown) > 10
    assert {*shown} <= known
