"""What is committed under experiments/results: every table is made of the numbers beside it."""

import csv
import itertools
import json
import math
import pathlib
import re

import pytest

from experiments import rates
from experiments.compare import page as compare_page
from experiments.compare import summary
from experiments.results import rank, scenes, verdict
from experiments.sweep.trial import ELBO
from svae_jax.analysis import tables as evaluation_tables

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
RENDER = {
    "experiments.compare": compare_page.render,
    "experiments.results.rank": rank.render,
    "experiments.results.scenes": scenes.render,
    "experiments.rates": rates.render,
    "svae_jax.main": lambda content: (
        evaluation_tables.markdown([{k: str(v) for k, v in run.items()} for run in content["runs"]])
        + "\n"
    ),
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


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("sweep.csv")), ids=lambda path: path.parent.name
)
def test_the_table_of_a_sweep_is_that_of_its_trials(path):
    pandas = pytest.importorskip("pandas")
    from experiments.sweep import results

    text = path.with_suffix(".md").read_text()
    title = text.splitlines()[0].removeprefix("# Sweep ")
    rows = pandas.read_csv(path, dtype=object)
    assert results.markdown(title, rows, ELBO) == text


def test_the_page_of_results_has_the_numbers_of_the_runs():
    assert (RESULTS / "README.md").read_text() == verdict.render()


def comparison(directory):
    return json.loads((RESULTS / directory / "comparison.json").read_text())


def table(page, *begin):
    """Head and body of the table on a page whose head begins so."""
    lines = (RESULTS.parents[1] / page).read_text().splitlines()
    rows = [[cell.strip("` ") for cell in line.split("|")[1:-1]] for line in lines]
    (start,) = (at for at, row in enumerate(rows) if row[: len(begin)] == [*begin])
    return rows[start], list(itertools.takewhile(bool, rows[start + 2 :]))


def spread(seeds, names):
    """Mean and standard deviation of each figure, as a comparison writes them."""
    spreads = summary.over_seeds(list(seeds.values()))
    return [compare_page.mean_and_sd(spreads[name]) for name in names]


@pytest.mark.parametrize(
    ("page", "first", "directory"),
    [
        ("experiments/results/short_runs.md", "model", "cifar10"),
        ("experiments/results/short_runs.md", "CelebA, 400 training steps", "celeba"),
    ],
)
def test_the_table_on_a_page_is_that_of_the_comparison(page, first, directory):
    content = comparison(directory)
    models = compare_page.by_model(content, "elbo")
    latents = {run["model"]: run["latent"] for run in content["runs"]}
    head, rows = table(page, first, "latent")
    assert [row[0] for row in rows] == list(models)
    for model, latent, *cells in rows:
        assert [cell.strip("*") for cell in cells] == spread(models[model], head[2:])
        assert latent == latents[model]


def started_at_pca():
    """By model and seed, the runs of 600 steps on the test split that start at PCA."""
    runs = json.loads((RESULTS / "cifar10_start" / "runs.json").read_text())["runs"]
    started: dict = {}
    for run in (run for run in runs if run["split"] == "test"):
        figures = {"ELBO, nats": run["elbo"], "bits/dim": run["bits_per_dim"]}
        started.setdefault(run["model"], {})[run["seed"]] = figures
    return started


def test_the_table_of_the_first_page_is_that_of_its_runs():
    short, long = (
        compare_page.by_model(comparison(name), "elbo") for name in ("cifar10", "cifar10_20_epochs")
    )
    begun = started_at_pca() | {name: short[name] for name in ("vector", "lowrank", "mvn")}
    _, rows = table("README.md", "model", "latent", "ELBO, 600 steps")
    for model, _, *cells in rows[:-3]:
        first, last = begun[model][0], long[model][0]
        expected = [f"{run['ELBO, nats']:,.0f}" for run in (first, last)]
        assert cells == [*expected, f"{last['bits/dim']:.3f}"], model
    content = json.loads((RESULTS / "cifar10_start" / "runs.json").read_text())
    many, pixels = (
        content["floors"][name]["elbo"] for name in ("as many latents", "Gaussian of the pixels")
    )
    assert [row[2] for row in rows[-3:-1]] == [f"{many:,.0f}", f"{pixels:,.0f}"]
    text = " ".join((RESULTS.parents[1] / "README.md").read_text().split())
    gain, longest = verdict.gain, "cifar10_20_epochs"
    chosen = verdict.runs("cifar10_start", "train[45000:]")
    of_prior = chosen["best_32"]["elbo"] - chosen["best_32, prior matrix_normal"]["elbo"]
    for words in (
        f"leads its vector by {gain('cifar10', 'mvn', 'vector')} nats after 600 steps (95%, three "
        f"seeds) and {gain(longest, 'mvn', 'vector')} after 20 epochs",
        f"rank-1 means are {gain('cifar10', 'vector', 'lowrank')} behind after 600 steps and "
        f"{gain(longest, 'lowrank', 'vector')} ahead after 20 epochs",
        f"each location given four neighbours gains {of_prior:,.0f} nats over one covariance",
        f"as the prior, `best` has {long['best'][0]['ELBO, nats, mixture']:,.0f}.",
    ):
        assert words in text


def test_the_table_of_runs_that_start_at_pca_is_that_of_their_numbers():
    compared = compare_page.by_model(comparison("cifar10"), "elbo")
    started = started_at_pca()
    names = {"plain": "best", "plain_vector": "best_vector"}  # what the comparison calls them
    page = "experiments/results/short_runs.md"
    head, rows = table(page, "model", "latent and what is new")
    assert [row[0] for row in rows] == [
        "vector", "plain_vector", "mvn", "plain", "plain_vector` with `model.linear=pca", "linear",
        "linear`, prior `tensor_normal", "best_vector", "best_32", "best_dense", "best",
    ]  # fmt: skip
    for model, _, *cells in rows:
        model = model.replace("`", "")
        seeds = started[model] if model in started else compared[names.get(model, model)]
        assert cells == spread(seeds, head[2:])

    def lead(maps, vector):
        means = [summary.over_seeds([*x.values()])["ELBO, nats"]["mean"] for x in (maps, vector)]
        return f"{means[0] - means[1]:,.0f}"

    content = json.loads((RESULTS / "cifar10_start" / "runs.json").read_text())
    text = (RESULTS.parents[1] / page).read_text()
    for floor in content["floors"].values():
        assert f" {floor['elbo']:,.0f}" in text.replace("\n", " ")
    with_path = started["linear"], started["plain_vector with model.linear=pca"]
    leads = lead(compared["best"], compared["best_vector"]), lead(*with_path)
    for shown in (text, (RESULTS.parents[1] / "README.md").read_text()):
        assert "{} nats without it (`plain`), {} with it".format(*leads) in shown


def test_the_table_of_the_released_codes_objective_is_that_of_the_comparisons():
    head, rows = table("experiments/results/short_runs.md", "released code's objective")
    maps = {
        "CIFAR-10": ("cifar10_released", "cifar10_equal_weight"),
        "CelebA": ("celeba_released", "celeba_equal_weight"),
    }
    found = {}
    for data, (released, equal) in maps.items():
        models = compare_page.by_model(comparison(released), "released_code")
        found |= {(data, model): seeds for model, seeds in models.items()}
        (found[data, "vector`, weighed like the maps"],) = compare_page.by_model(
            comparison(equal), "elbo"
        ).values()
    assert len(rows) == 8
    for data, model, _, *cells in rows:
        assert cells == spread(found[data, model], head[3:])


def test_the_table_of_low_rank_means_is_on_the_page():
    """The same table, with the same figures, as the command wrote."""
    rows = (RESULTS / "cifar10_rank.md").read_text().split("\n\n")[1]
    assert rows in (RESULTS / "short_runs.md").read_text()


def test_the_table_of_long_runs_is_that_of_the_comparisons():
    head, (*rows, short) = table(
        "experiments/results/short_runs.md", "6,000 training steps, seed 0", "vector"
    )
    models = compare_page.by_model(comparison("cifar10_long"), "elbo")
    digits = {"ELBO": 0, "bits/dim": 3, "PSNR": 2, "swd_mean": 4}
    for name, *cells in rows:
        decimals = digits[name.split(",")[0]]
        expected = [f"{models[model][0][name]:,.{decimals}f}" for model in head[1:]]
        assert [cell.strip("*") for cell in cells] == expected
    at_first = compare_page.by_model(comparison("cifar10"), "elbo")
    expected = [f"{at_first[model][0]['ELBO, nats']:,.0f}" for model in head[1:]]
    assert [cell.strip("*") for cell in short[1:]] == expected


def test_the_distances_on_the_page_are_those_of_the_evaluations():
    runs = json.loads((RESULTS / "cifar10_samples" / "evaluations.json").read_text())["runs"]
    known = {
        evaluation_tables.figure(run["samples"]["gaussian"]["pixels"]["figures"]["swd_mean"])
        for run in runs
    }
    text = (RESULTS / "short_runs.md").read_text()
    _, _, table = text.partition("| latents an image |")
    shown = re.findall(r"0\.\d+ ± 0\.\d+", table.partition("\n\n")[0])
    assert len(shown) > 10
    assert {*shown} <= known


def test_the_sizes_noises_and_priors_are_those_of_the_sweep():
    with (RESULTS / "cifar10_linear" / "sweep.csv").open() as file:
        trials = list(csv.DictReader(file))
    elbos = {
        (int(t["d"]), int(t["N"]), t["objective.likelihood"], t["latent.prior"]): float(t[ELBO])
        for t in trials
    }
    assert len(elbos) == len(trials) == 40
    settings = list(
        itertools.product(("gaussian", "gaussian_blocks"), ("standard", "autoregressive"))
    )
    _, rows = table("experiments/results/short_runs.md", "latents", "maps")
    for latents, maps, *cells in rows:
        d, _, n = map(int, maps.split("\u00d7"))
        assert latents == f"{d * d * n:,}"
        assert cells == [f"{elbos[d, n, *setting]:,.0f}" for setting in settings]
    assert len(rows) == 10

    def gain(first, second):
        return f"{elbos[first] - elbos[second]:,.0f}"

    of_prior = [
        gain((8, n, "gaussian", "autoregressive"), (8, n, "gaussian", "standard"))
        for n in (4, 16, 32, 48)
    ]
    of_noise = [
        gain((8, n, "gaussian_blocks", "autoregressive"), (8, n, "gaussian", "autoregressive"))
        for n in (4, 48)
    ]
    standard = gain((4, 128, "gaussian", "standard"), (8, 32, "gaussian", "standard"))
    learned = gain((8, 32, "gaussian", "autoregressive"), (4, 128, "gaussian", "autoregressive"))
    text = " ".join((RESULTS / "short_runs.md").read_text().split())
    for words in (
        "{} nats for 256 latents, {} for 1,024, {} for 2,048 and {} for 3,072".format(*of_prior),
        "they gain {} nats for 256 latents, {} for 3,072".format(*of_noise),
        f"ahead*, by {standard} nats for 2,048 latents",
        f"8\u00d78 are ahead, by {learned}.",
    ):
        assert words in text, words
