"""What the runs of a comparison say together: mean and spread over seeds, differences in pairs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from svae_jax import latents
from svae_jax.evaluation.per_image import METRICS

Figures = Mapping[str, float]
Spread = dict[str, Any]  # the mean of a figure, how it varies, and of how many runs

BASELINES = ("vector", "best_vector", "plain_vector")  # models that the others are compared with
CONFIDENCE = 0.95
FLOOR_PREFIX = "PCA, "  # names of linear floors


def figures_of_run(result: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one run by name, from its `result.json` and `evaluation.json`.

    Distances of samples are named `DISTANCE, SAMPLER`, as in `swd_mean, flow`, bounds with a
    sampler in the prior's place likewise, and the ELBOs of linear floors `PCA, FLOOR`. A figure
    that is not finite is left out.
    """
    # Section and name in evaluation.json, and the name here.
    evaluated = [(metric.section, name, metric.label) for name, metric in METRICS.items()]
    evaluated.append(("bounds", "bits_per_dim_iw", "bits/dim, importance-weighted"))
    found = {
        label: evaluation[section][key]["value"]
        for section, key, label in evaluated
        if key in evaluation[section]
    }
    for name, floor in evaluation.get("floors", {}).items():
        found[f"{FLOOR_PREFIX}{name}"] = floor["elbo"]["value"]
    found["active units"] = evaluation["latents"]["active_units"]
    for samples, distances in evaluation["samples"].items():
        for space in ("pixels", "features"):
            for distance, estimate in distances.get(space, {}).get("figures", {}).items():
                found[f"{distance}, {samples}"] = estimate["value"]
        for section, key, label in evaluated:
            if section == "bounds" and key in distances.get("bounds", {}):
                found[f"{label}, {samples}"] = distances["bounds"][key]["value"]
    for part, number in evaluation["parameters"].items():
        found[f"parameters, {part}"] = number
    found["images/s"] = result["images_per_second"]
    return {name: float(x) for name, x in found.items() if x is not None and math.isfinite(x)}


def latent(described: Mapping[str, Any]) -> str:
    """The latent of a configuration in words: posterior, rank, height × width × maps."""
    rank = f", rank {described['rank']}" if latents.has_rank(described["name"]) else ""
    return "{name}{}, {height}x{width}x{maps}".format(rank, **described)


def over_seeds(runs: Sequence[Figures]) -> dict[str, Spread]:
    """Mean and standard deviation of every figure over runs that differ in their seed alone.

    Returns:
        name -> {"mean", "sd", "n"}; the standard deviation is that of a sample (n − 1), and None
        for a single run.
    """
    found: dict[str, Spread] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run[name] for run in runs if name in run]
        sd = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}
    return found


def paired(runs: Mapping[int, Figures], baseline: Mapping[int, Figures]) -> dict[str, Spread]:
    """Differences to the baseline, seed by seed, with their interval of 95%.

    A pair shares the order of the images and every stream of random numbers, so part of the seeds'
    spread cancels. The interval is Student's t for the mean of the differences.

    Args:
        runs: figures by seed.
        baseline: likewise; seeds that one of the two lacks are left out.

    Returns:
        name -> {"mean", "half_width", "n"}; `half_width` is None for a single pair.
    """
    differences = [
        {k: runs[s][k] - baseline[s][k] for k in runs[s] if k in baseline[s]}
        for s in sorted(runs.keys() & baseline.keys())
    ]
    found = over_seeds(differences)
    for spread in found.values():
        n, sd = spread["n"], spread.pop("sd")
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
        spread["half_width"] = None if sd is None else quantile * sd / math.sqrt(n)
    return found
