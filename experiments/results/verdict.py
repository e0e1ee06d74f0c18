"""Writes README.md, the page of results: README.md.jinja with its numbers, all from JSON files.

python -m experiments.results.verdict
"""

import json
from pathlib import Path
from typing import Any

import jinja2

from experiments.compare import page, summary

FOLDER = Path(__file__).parent


def render() -> str:
    """The page.

    Raises:
        jinja2.UndefinedError: a number that no file has.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits=0: f"{value:,.{digits}f}"
    template = environment.get_template("README.md.jinja")
    functions = {f.__name__: f for f in (models, mean, gain, prior_gain, runs, floor, rate, scenes)}
    return template.render(**functions)


def content(name: str) -> Any:
    """A JSON file of this folder."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def models(study: str) -> dict[str, dict[int, summary.Figures]]:
    """Model -> seed -> figures, of a comparison with the ELBO."""
    return page.by_model(content(f"{study}/comparison"), "elbo")


def mean(study: str, model: str, figure: str, digits: int = 0) -> str:
    """A figure's mean over seeds."""
    values = summary.over_seeds([*models(study)[model].values()])
    return f"{values[figure]['mean']:,.{digits}f}"


def gain(study: str, model: str, baseline: str, figure: str = "ELBO, nats", digits: int = 0) -> str:
    """The mean difference to a baseline, seed by seed, with half its 95% interval if it has one."""
    found = summary.paired(models(study)[model], models(study)[baseline])[figure]
    width = found["half_width"]
    return f"{found['mean']:,.{digits}f}" + (f" ± {width:,.{digits}f}" if width else "")


def prior_gain(model: str, sampler: str = "mixture") -> str:
    """What the ELBO gains after 20 epochs with a fitted sampler in the prior's place, in nats."""
    figures = models("cifar10_20_epochs")[model][0]
    return f"{figures[f'ELBO, nats, {sampler}'] - figures['ELBO, nats, prior']:,.0f}"


def runs(study: str, split: str = "test") -> dict[str, Any]:
    """Model -> the run of seed 0, with its `elbo` in nats and `bits_per_dim`."""
    found = content(f"{study}/runs")["runs"]
    return {run["model"]: run for run in found if run["seed"] == 0 and run["split"] == split}


def floor(name: str) -> float:
    """The ELBO of a linear floor of CIFAR-10, in nats."""
    return content("cifar10_start/runs")["floors"][name]["elbo"]


def rate(model: str, nats: float) -> dict[str, Any]:
    """The model of rate and distortion whose KL is nearest to so many nats."""
    found = [run for run in content("cifar10_rates/rates")["runs"] if run["model"] == model]
    return min(found, key=lambda run: abs(run["kl"] - nats))


def scenes(images: str) -> str:
    """The share of samples of the embedded scenes that are whole, in percent."""
    rows = content("shapes_samples/scenes")["runs"]
    (found,) = (row["whole, %"]["value"] for row in rows if row["images"] == images)
    return f"{found:.0f}"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(render())
