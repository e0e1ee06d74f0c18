"""What a sweep has found: `sweep.csv`, `sweep.md` and the figure `sweep.png` in its directory."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.sweep import trial as trials
from experiments.sweep.trial import Criterion, Outcome
from svae_jax import files
from svae_jax.analysis import tables
from svae_jax.errors import UserError

_MOST_LABELS = 10  # lines of a panel with a legend, and ticks of an axis that names each value
_COLUMNS = 3  # of panels
_OVER_SEEDS = ["mean", "std", "size", "speed"]  # of a setting's trials
_LOGARITHMIC = 20  # the ratio of a parameter's values from which its axis is logarithmic


def write(directory: Path, title: str, found: Sequence[Outcome], metric: Criterion) -> list[Path]:
    """Writes the files of a report; the figure needs a trial that is done.

    Returns:
        The files that were written.

    Raises:
        UserError: no finished trial has the metric (the message lists those there are), or a file
            cannot be written.
    """
    rows = table(found)
    done = rows[rows.status == trials.DONE]
    if len(done) and not (metric.name in done and done[metric.name].notna().any()):
        known = ", ".join(sorted({name for outcome in found for name in outcome.metrics}))
        raise UserError(f"--metric={metric.name}: the trials have {known}")
    written = [directory / "sweep.csv", directory / "sweep.md", directory / "sweep.png"]
    if not (len(done) and parameters(done)):
        written.pop()
    with files.os_errors_for_user(f"--workdir={directory} cannot be written"):
        rows.to_csv(written[0], index=False)
        written[1].write_text(markdown(title, rows, metric, has_figure=len(written) > 2))
        for path in written[2:]:
            figure(done, metric).savefig(path, dpi=120)
    return written


def table(found: Sequence[Outcome]) -> pd.DataFrame:
    """One row a trial; the parameters stand between `status` and `step`."""
    parts = [
        [{"trial": outcome.trial.name, "status": outcome.status} for outcome in found],
        [outcome.trial.parameters() for outcome in found],
        [{"step": outcome.step} for outcome in found],
        [outcome.metrics for outcome in found],
        [
            {
                "images_per_second": outcome.images_per_second,
                "num_parameters": outcome.num_parameters,
                "reason": outcome.reason,
                "workdir": str(outcome.trial.workdir),
            }
            for outcome in found
        ],
    ]
    return pd.concat([pd.DataFrame(part, dtype=object) for part in parts], axis=1)


def parameters(rows: pd.DataFrame) -> list[str]:
    """The names of what the sweep sets."""
    columns = list(rows)
    return columns[columns.index("status") + 1 : columns.index("step")]


def markdown(title: str, rows: pd.DataFrame, metric: Criterion, has_figure: bool) -> str:
    """The text of `sweep.md`."""
    counts = rows.status.value_counts(sort=False)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    parts = [f"# Sweep {title}", f"{len(rows)} trials: {states}."]
    done = rows[rows.status == trials.DONE]
    values = metric.sign * _numbers(done, metric.name)
    if values.notna().any():
        best = values.idxmax()
        value = f"{metric.sign * values[best]:.6g}"
        parts.append(f"Best {metric.name}: {value}, by {rows.trial[best]}.")
    if len(done):
        parts.append(tables.markdown(_records(done, metric)))
    if has_figure:
        parts.append(f"![{metric.name} against each parameter](sweep.png)")
    for status in (trials.FAILED, trials.PRUNED):
        those = rows[rows.status == status]
        if len(those):
            lines = [f"- `{row.trial}`: {row.reason}" for row in those.itertuples()]
            parts += [f"## {status.capitalize()}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def figure(done: pd.DataFrame, metric: Criterion) -> Any:
    """A panel for each parameter with several values: small points are trials, large ones means.

    Trials that diverged are grey triangles at the edge. Of a sweep that makes one change at a time
    it shows what each change gains instead.

    Args:
        done: the rows of trials that are done.
        metric: what is drawn.
    """
    from matplotlib.figure import Figure

    done = done.assign(value=_numbers(done, metric.name))
    settings, edge = _settings(done, metric), _edge(metric.sign * done.value) * metric.sign
    if changes := _changes(settings):
        drawn = Figure(figsize=(8, 1 + 0.24 * len(changes)), layout="constrained")
        _draw_changes(drawn.subplots(), settings, changes, metric, edge)
        return drawn
    swept = _swept(done)
    follow = _followers(settings[swept])
    several = [name for name in swept if done[name].nunique() > 1 and name not in follow]
    shown = several or swept or [trials.SEED]
    rows, columns = math.ceil(len(shown) / _COLUMNS), min(len(shown), _COLUMNS)
    drawn = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    panels = drawn.subplots(rows, columns, squeeze=False).flat
    for name, axes in zip(shown, panels, strict=False):
        others = [other for other in swept if other not in (name, *follow)]
        _draw(axes, done[done[name].notna()], name, others, metric, edge)
    for axes in drawn.axes[len(shown) :]:
        axes.remove()
    return drawn


def _numbers(rows: pd.DataFrame, name: str) -> pd.Series:
    """A column as floats; NaN where there is none."""
    return pd.to_numeric(rows.get(name, pd.Series(math.nan, rows.index))).astype(float)


def _swept(rows: pd.DataFrame) -> list[str]:
    """The parameters of these trials, without the seed."""
    return [n for n in parameters(rows) if n != trials.SEED and rows[n].notna().any()]


def _settings(done: pd.DataFrame, metric: Criterion) -> pd.DataFrame:
    """A row for each setting of the parameters other than the seed, with what its trials say."""
    swept = _swept(done)
    own = done[["status", *swept]].assign(
        value=_numbers(done, metric.name), speed=_numbers(done, "images_per_second")
    )
    own["setting"] = own.groupby(swept or ["status"], dropna=False, sort=False).ngroup()
    found = own.groupby("setting").agg(
        mean=("value", "mean"), std=("value", "std"), size=("value", "size"),
        speed=("speed", "mean"),
    )  # fmt: skip
    return own.drop_duplicates("setting").set_index("setting")[swept].join(found)


def _records(done: pd.DataFrame, metric: Criterion) -> list[dict[str, str]]:
    """The settings as text, best first; those without the metric last."""
    settings = _settings(done, metric)
    order = (-metric.sign * settings["mean"]).sort_values(kind="stable").index
    return [
        {name: "" if pd.isna(row[name]) else str(row[name]) for name in _swept(done)}
        | {
            metric.name: f"{row['mean']:.6g}",
            "standard deviation over seeds": "" if pd.isna(row["std"]) else f"{row['std']:.3g}",
            "trials": str(row["size"]),
            "images/s": "" if pd.isna(row["speed"]) else f"{row['speed']:,.0f}",
        }
        for row in settings.loc[order].to_dict("records")
    ]


def _edge(values: pd.Series) -> float:
    """Below it, ten times as far from the best as the median, a trial has diverged."""
    edge = values.max() - 10 * (values.max() - values.median())
    return edge if values.min() < edge < values.max() else -math.inf


def _changes(settings: pd.DataFrame) -> list[dict[str, Any]]:
    """What each setting but the first changes, if the sweep makes one change at a time to that.

    It does if not all settings change the same parameters, as in a random search, and if each value
    of a change belongs to a single setting: in a grid, values come again. A posterior may come with
    several ranks.
    """
    first, *others = settings.drop(columns=_OVER_SEEDS).to_dict("records")
    changed = [
        {name: x for name, x in setting.items() if pd.notna(x) and x != first[name]}
        for setting in others
    ]
    values = [
        (name, x)
        for changes in changed
        for name, x in changes.items()
        if name != trials.POSTERIOR or len(changes) == 1
    ]
    is_one_at_a_time = all(changed) and len(set(values)) == len(values)
    return changed if is_one_at_a_time and len(set(map(frozenset, changed))) > 1 else []


def _followers(settings: pd.DataFrame) -> list[str]:
    """Parameters that say nothing new: constant ones, and those that follow from an earlier one.

    So they do if each value of the earlier one has a single value of theirs, and comes with two
    settings on average: in a random search each value comes once, and nothing follows from it.
    """
    found: list[str] = []
    for at, name in enumerate(settings):
        earlier = [other for other in list(settings)[:at] if other not in found]
        for others in ([], *([other] for other in earlier)):  # a constant follows from nothing
            values = len(settings[others].drop_duplicates()) if others else 1
            pairs = len(settings[[*others, name]].drop_duplicates())
            if pairs == values <= len(settings) / 2:
                found.append(name)
                break
    return found


def _short(setting: Mapping[str, Any], most: int = 32) -> str:
    """Such as `N=64, decoder=3x3/192 3x3/64…`: fields by the last part of their name."""
    named = {name.rpartition(".")[2]: x for name, x in setting.items() if pd.notna(x)}
    return _cut(", ".join(f"{name}={x}" for name, x in named.items()), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _draw_changes(
    axes: Any, settings: pd.DataFrame, changes: Sequence[Any], metric: Criterion, edge: float
) -> None:
    """What each change adds to the mean of the first setting, whose spread is the grey band."""
    first, *others = settings.to_dict("records")
    base, sign = first["mean"], metric.sign
    for at, row in enumerate(others):
        if sign * row["mean"] < sign * edge:
            axes.plot([edge - base], [at], "<" if sign > 0 else ">", color="0.5")
        else:
            color = "C0" if sign * (row["mean"] - base) > 0 else "C3"
            axes.errorbar([row["mean"] - base], [at], xerr=[row["std"]], fmt="o", color=color)
    axes.axvline(0, color="0.3", linewidth=0.8)
    if pd.notna(first["std"]):
        axes.axvspan(-2 * first["std"], 2 * first["std"], color="0.9", zorder=0)
    axes.set_yticks(range(len(changes)), list(map(_short, changes)), fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"change of {metric.name}; grey: two standard deviations over seeds")
    # Of the figure, which is wider than the panel and lets no title out of it.
    setting = _short({k: x for k, x in first.items() if k not in _OVER_SEEDS}, most=1000)
    title = textwrap.fill(f"One change at a time to {setting} ({base:.5g})", 80)
    axes.figure.suptitle(title, fontsize="medium")


def _draw(
    axes: Any, done: pd.DataFrame, name: str, others: Sequence[str], metric: Criterion, edge: float
) -> None:
    """The metric against one parameter: a line for each setting of the others."""
    values = list(dict.fromkeys(done[name]))
    numeric = all(isinstance(value, int | float) for value in values)
    places = {value: value if numeric else at for at, value in enumerate(values)}
    done = done.assign(at=done[name].map(places).astype(float))
    far = metric.sign * done.value < metric.sign * edge
    marker = "v" if metric.sign > 0 else "^"
    if far.any():
        axes.plot(done["at"][far], [edge] * far.sum(), marker, color="0.5", clip_on=False, zorder=3)
    lines = done[~far].groupby(list(others) or ["status"], dropna=False, sort=False)
    for setting, rows in lines:
        spread = rows.groupby("at").value.agg(["mean", "std"])
        line, *_ = axes.errorbar(
            spread.index, spread["mean"], spread["std"].fillna(0), fmt="o-" if numeric else "o",
            capsize=3, label=_short(dict(zip(others, setting, strict=False))) or "nothing else set",
        )  # fmt: skip
        axes.plot(rows["at"], rows.value, ".", color=line.get_color(), alpha=0.5)
    axes.set(xlabel=name, ylabel=metric.name)
    if numeric and min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC:
        axes.set_xscale("log")
    if not numeric or len(values) <= _MOST_LABELS:
        texts = [_cut(str(value), 16) for value in values]
        axes.set_xticks(list(places.values()), texts, rotation=30, horizontalalignment="right")
        axes.minorticks_off()
    if 1 < len(lines) <= _MOST_LABELS:
        axes.legend(fontsize="x-small")
