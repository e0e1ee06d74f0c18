"""A comparison as Markdown; every number is computed from `comparison.json`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.compare import summary
from svae_jax.analysis import tables
from svae_jax.analysis.evaluating import FLOOR
from svae_jax.evaluation.per_image import METRICS

Comparison = Mapping[str, Any]
Record = dict[str, str]
Models = Mapping[str, Mapping[int, summary.Figures]]  # model -> seed -> figures

# Columns of the first table; the others follow from the samplers.
_LABELS = [metric.label for name, metric in METRICS.items() if name != "mse"]  # PSNR says the same
_LIKELIHOOD = (*_LABELS[:2], "bits/dim, importance-weighted", *_LABELS[2:], "active units")
_PAIRED = ("ELBO, nats", "bits/dim", "bits/dim, importance-weighted", "KL, nats", "PSNR, dB")
_COST = ("parameters, encoder", "parameters, decoder", "images/s")


def render(comparison: Comparison) -> str:
    """The whole of `comparison.md`: for each scaling its tables, then how it was made."""
    scalings = list(dict.fromkeys(run["scaling"] for run in comparison["runs"]))
    parts = [_scaling(comparison, scaling) for scaling in scalings]
    return "\n\n".join([*parts, _search(comparison), _notes(comparison)]) + "\n"


def by_model(comparison: Comparison, scaling: str) -> dict[str, dict[int, summary.Figures]]:
    """Model -> seed -> figures, of the runs with one scaling."""
    found: dict[str, dict[int, summary.Figures]] = {}
    for run in comparison["runs"]:
        if run["scaling"] == scaling:
            found.setdefault(run["model"], {})[run["seed"]] = run["figures"]
    return found


def _scaling(comparison: Comparison, scaling: str) -> str:
    models = by_model(comparison, scaling)
    samplers = comparison["settings"]["samplers"]
    latents = {run["model"]: {"latent": run["latent"]} for run in comparison["runs"]}
    blocks = {"Likelihood, reconstruction and use of the latent": _mean_table(models, _LIKELIHOOD)}
    names = (*_PAIRED, *(f"swd_mean, {name}" for name in samplers))
    for baseline in (b for b in summary.BASELINES if b in models and len(models) > 1):
        title = f"Differences to `{baseline}`, seed by seed, with their 95% interval"
        blocks[title] = _paired_table(models, baseline, names)
    blocks |= {
        "Linear floors: the ELBO of PCA with the prior N(0, I) beside each model, nats": (
            _floor_table(models)
        ),
        "Samples: distances to held-out images, and bounds with their distribution as the prior": (
            _sample_table(models, samplers)
        ),
        "Size and speed": _mean_table(models, _COST, latents),
    }
    shown = "\n\n".join(f"### {title}\n\n{table}" for title, table in blocks.items() if table)
    return f"## Objective: `{scaling}`\n\n{shown}"


def _mean_table(models: Models, names: Sequence[str], also: Mapping[str, Record] = {}) -> str:
    """A row for each model; `also` are its columns of words."""
    records = []
    for model, seeds in models.items():
        spreads = summary.over_seeds(list(seeds.values()))
        records.append(
            {"model": model, **also.get(model, {}), "seeds": str(len(seeds))}
            | {name: mean_and_sd(spreads[name]) for name in names if name in spreads}
        )
    return tables.markdown(records)


def _floor_table(models: Models) -> str:
    """A row for each model, a column for each of its linear floors; empty if there are none."""
    runs = [figures for seeds in models.values() for figures in seeds.values()]
    names = [name for figures in runs for name in figures if name.startswith(summary.FLOOR_PREFIX)]
    return _mean_table(models, ("ELBO, nats", *dict.fromkeys(names))) if names else ""


def _sample_table(models: Models, samplers: Sequence[str]) -> str:
    """A row for each model and sampler, a column for each figure of it; real images come last.

    Theirs are the same for all runs, which share the images and the directions.
    """
    rows = [
        (model, name, [*seeds.values()]) for model, seeds in models.items() for name in samplers
    ]
    rows.append(("", FLOOR, [next(iter(next(iter(models.values())).values()))]))
    records = []
    for model, samples, runs in rows:
        ending = f", {samples}"
        figures = {
            name.removesuffix(ending): mean_and_sd(spread)
            for name, spread in summary.over_seeds(runs).items()
            if name.endswith(ending) and not name.startswith("parameters")  # of a learned prior
        }
        records += [{"model": model, "samples": samples, **figures}] if figures else []
    return tables.markdown(records) if records else ""


def _paired_table(models: Models, baseline: str, names: Sequence[str]) -> str:
    records = []
    for model, seeds in models.items():
        if model != baseline:
            found = summary.paired(seeds, models[baseline])
            differences = {name: _difference(found[name]) for name in names if name in found}
            records.append({"model": model, **differences})
    return tables.markdown(records)


def mean_and_sd(spread: Mapping[str, float | None]) -> str:
    """Mean ± standard deviation, rounded to the latter's second digit."""
    return tables.figure({"value": spread["mean"], "standard_error": spread["sd"]})


def _difference(difference: Mapping[str, float | None]) -> str:
    mean, half_width = difference["mean"], difference["half_width"]
    text = tables.figure({"value": mean, "standard_error": half_width})
    return text if mean is None or math.copysign(1, mean) < 0 else f"+{text}"


def _search(comparison: Comparison) -> str:
    """The search of the learning rate: the held-out ELBO of each, the chosen one in bold."""
    records: dict[tuple[str, str], Record] = {}
    chosen = {(r["scaling"], r["model"]): r["learning_rate"] for r in comparison["runs"]}
    for trial in comparison["search"]:
        at = (trial["scaling"], trial["model"])
        row = records.setdefault(at, {"objective": at[0], "model": at[1]})
        text = f"{trial['elbo']:,.1f}" if trial["elbo"] is not None else "failed"
        is_chosen = chosen.get(at) == trial["learning_rate"]
        row[f"{trial['learning_rate']:g}"] = f"**{text}**" if is_chosen else text
    if not records:
        given = dict.fromkeys(f"{model} {rate:g}" for (_, model), rate in chosen.items())
        return f"Learning rates, which were given: {', '.join(given)}."
    split, steps = (comparison["settings"][name] for name in ("search_split", "search_steps"))
    return (
        "## Search of the learning rate\n\n"
        f"ELBO in nats after {steps:,} training steps on `{split}`, on which no model was trained "
        "in the search; in bold what the runs above use.\n\n"
        + tables.markdown(list(records.values()))
    )


def _notes(comparison: Comparison) -> str:
    settings = comparison["settings"]
    lines = [
        "Figures are mean ± standard deviation over seeds. Bits/dim are of 8-bit images. "
        f"Importance-weighted: K = {settings['importance_samples']}. Distances: "
        f"{settings['num_samples']:,} samples at most against `{settings['split']}`.",
        f"{settings['num_steps']:,} training steps of {settings['batch_size']} images of "
        f"`{settings['dataset']}`; {settings['device']}.",
        f"Made by `{settings['command']}`.",
    ]
    return "## How\n\n" + "\n\n".join(lines)
