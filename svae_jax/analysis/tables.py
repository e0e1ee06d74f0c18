"""Evaluations as tables that people read, in Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from svae_jax.evaluation.per_image import METRICS

Record = Mapping[str, str]


def evaluations(results: Sequence[Mapping[str, Any]]) -> str:
    """Results of `evaluating.evaluate`: tables of runs, of linear floors and of sets of samples.

    A figure stands as value ± standard error. Distances are named as in `quality.comparison`.
    """
    blocks = [markdown(table(results)) for table in (runs, floors, sets) if table(results)]
    return "\n\n".join([*blocks, notes(results)])


def runs(results: Sequence[Mapping[str, Any]]) -> list[Record]:
    """One row a run: bounds, quality of reconstructions, active units."""
    return [{"run": _run(result), **_run_figures(result)} for result in results]


def floors(results: Sequence[Mapping[str, Any]]) -> list[Record]:
    """One row a run and linear floor: what PCA reaches, and how far above it the run is."""
    return [
        {
            "run": _run(result),
            "PCA": name,
            "components": "{height}x{width}x{components}".format(**floor),
            "decoder parameters": f"{floor['decoder_params']:,}",
            "ELBO of PCA, nats": figure(floor["elbo"]),
            "run - PCA": f"{result['bounds']['elbo']['value'] - floor['elbo']['value']:+,.0f}",
        }
        for result in results
        for name, floor in result.get("floors", {}).items()
    ]


def sets(results: Sequence[Mapping[str, Any]]) -> list[Record]:
    """One row a set of samples: its distances to held-out images, and its sampler's bounds."""
    return [
        {
            "run": _run(result),
            "samples": name,
            **_set_figures(found),
            **_bounds_as_prior(result, found),
        }
        for result in results
        for name, found in result["samples"].items()
    ]


def markdown(records: Sequence[Record]) -> str:
    """An aligned table; a record that lacks a column has an empty cell there."""
    columns = list(dict.fromkeys(column for record in records for column in record))
    rows = [columns, *([record.get(column, "") for column in columns] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def figure(estimate: Mapping[str, float | None]) -> str:
    """An estimate as text, such as `1,350.4 ± 3.1`: rounded to the error's second digit."""
    value, error = estimate["value"], estimate["standard_error"]
    if value is None:
        return "NaN"
    size = error or abs(value) / 100
    digits = 0 if size == 0 else min(max(1 - math.floor(math.log10(size)), 0), 6)
    text = f"{value:,.{digits}f}"
    return text if error is None else f"{text} ± {error:,.{digits}f}"


def _run(result: Mapping[str, Any]) -> str:
    return str(result["workdir"])


def _weighted(result: Mapping[str, Any]) -> tuple[str, str]:
    """The importance-weighted bound in bits/dim, where images are of integers: metric, label."""
    name = "bits_per_dim" if "bits_per_dim" in result["bounds"] else "elbo"
    return name, f"{METRICS[name].label}, K={result['settings']['importance_samples']}"


def _bounds_as_prior(result: Mapping[str, Any], found: Mapping[str, Any]) -> Record:
    if "bounds" not in found:
        return {}
    name, label = _weighted(result)
    columns = {METRICS["elbo"].label: "elbo", label: f"{name}_iw"}
    figures = found["bounds"]
    return {label: figure(figures[key]) for label, key in columns.items() if key in figures}


def _run_figures(result: Mapping[str, Any]) -> Record:
    weighted, label = _weighted(result)
    columns = {}
    for name, metric in METRICS.items():
        if name in result[metric.section] and name != "reconstruction":  # it is ELBO plus KL
            columns[metric.label] = figure(result[metric.section][name])
        if name == weighted:
            columns[label] = figure(result["bounds"][f"{name}_iw"])
    return {**columns, "active units": f"{result['latents']['active_units']:,}"}


def _set_figures(distances: Mapping[str, Any]) -> Record:
    figures = {
        name: figure(estimate)
        for space in ("pixels", "features")
        if space in distances
        for name, estimate in distances[space]["figures"].items()
    }
    nearest = {
        f"nearest, {space}": figure(found["median_ratio"])
        for space, found in distances["memorisation"].items()
    }
    return figures | nearest


def notes(results: Sequence[Mapping[str, Any]]) -> str:
    """What the figures are of, one line for each run and space."""
    lines = []
    for result in results:
        first = next(iter(result["samples"].values()))
        lines.append(
            f"{_run(result)}: step {result['step']}, {result['num_images']:,} images of "
            f"{result['config']['dataset']['name']} {result['split']}"
            + (f"; sigma {result['bounds']['sigma']:.4f}" if "sigma" in result["bounds"] else "")
        )
        for space in ("pixels", "features"):
            if space in first:
                compared = first[space]
                settings = ", ".join(f"{k} {v}" for k, v in compared["settings"].items())
                lines.append(
                    f"  {space}: {compared['num_samples']:,} images against "
                    f"{compared['num_reference']:,} of {compared['reference']}; {settings}"
                )
    if any(result.get("floors") for result in results):
        lines.append(
            "PCA: with the prior N(0, I); log p(x) for one Gaussian sigma where patches tile the "
            "image, else a lower bound: the posterior of PCA, with sigma fitted, one for each "
            "direction where there are several"
        )
    if any("bounds" in found for result in results for found in result["samples"].values()):
        lines.append(
            "ELBO beside samples: with their distribution of z in the prior's place, the decoder "
            "unchanged"
        )
    lines.append(
        "nearest: median distance of samples to their nearest training image, over that of "
        "held-out images"
    )
    return "\n".join(lines)
