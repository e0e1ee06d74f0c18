"""What a sweep has found: `sweep.csv`, `sweep.md` and the figure `sweep.png` in its directory."""

import collections
import csv
import importlib.util
import io
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.sweep import outcomes
from experiments.sweep.board import best_of
from experiments.sweep.outcomes import Metric, Outcome
from experiments.sweep.trial import POSTERIOR, SEED
from svae_jax import files
from svae_jax.errors import UserError

_MOST_LABELS = 10  # lines of a panel with a legend
_MOST_TICKS = 10  # of an axis that names each value
_COLUMNS = 3  # of panels
_MOST_LETTERS = 32  # of a label
_LETTERS_OF_TICK = 16
_LINE = 80  # letters of a line of a title
_LOGARITHMIC = 20  # the ratio of a parameter's values from which its axis is logarithmic

Group = tuple[tuple[str, Any], ...]  # trials that differ in nothing but the seed


def write(directory: Path, title: str, found: Sequence[Outcome], metric: Metric) -> list[Path]:
    """Writes the files of a report; the figure needs matplotlib and a trial that is done.

    Returns:
        The files that were written.

    Raises:
        UserError: no finished trial has the metric (the message lists those there are), or a file
            cannot be written.
    """
    done = [outcome for outcome in found if outcome.status == outcomes.DONE]
    if done and all(metric.name not in outcome.metrics for outcome in done):
        known = ", ".join(sorted(set().union(*(outcome.metrics for outcome in done))))
        raise UserError(f"--metric={metric.name}: the trials have {known}")
    written = [directory / "sweep.csv", directory / "sweep.md"]
    with files.os_errors_for_user(f"--workdir={directory} cannot be written"):
        has_axes = any(outcome.trial.overrides for outcome in done) and _can_draw()
        picture = _figure(directory, done, metric) if has_axes else None
        written[0].write_text(_csv(found))
        written[1].write_text(_markdown(title, found, metric, picture))
    return [*written, *([picture] if picture else [])]


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _csv(found: Sequence[Outcome]) -> str:
    """One row a trial."""
    swept = _names(o.trial.parameters() for o in found)
    measured = _names(o.metrics for o in found)
    numbers = ["images_per_second", "num_parameters"]
    text = io.StringIO()
    columns = ["trial", "status", *swept, "step", *measured, *numbers, "reason", "workdir"]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for outcome in found:
        own = ("status", "step", *numbers, "reason")
        row = {"trial": outcome.trial.name, "workdir": outcome.trial.workdir}
        row |= {name: getattr(outcome, name) for name in own}
        table.writerow(row | outcome.trial.parameters() | outcome.metrics)
    return text.getvalue()


def _names(rows: Any) -> list[str]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _markdown(title: str, found: Sequence[Outcome], metric: Metric, picture: Path | None) -> str:
    counts = collections.Counter(outcome.status for outcome in found)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    lines = [f"# Sweep {title}", "", f"{len(found)} trials: {states}.", ""]
    done = [outcome for outcome in found if outcome.status == outcomes.DONE]
    if (best := best_of(done, metric)) is not None:
        lines += [f"Best {metric.name}: {best.value(metric):.6g}, by {best.trial.name}.", ""]
    groups = _groups(done)
    if groups:
        swept = _names(dict(group) for group in groups)
        spread = f"{metric.name} | standard deviation over seeds | trials | images/s"
        lines += [f"| {' | '.join([*swept, spread])} |", "|---" * (len(swept) + 4) + "|"]
        lines += [_row(dict(g), swept, groups[g], metric) for g in _ranked(groups, metric)] + [""]
    if picture is not None:
        lines += [f"![{metric.name} against each parameter]({picture.name})", ""]
    for status in (outcomes.FAILED, outcomes.PRUNED):
        those = [outcome for outcome in found if outcome.status == status]
        if those:
            lines += [f"## {status.capitalize()}", ""]
            lines += [f"- `{outcome.trial.name}`: {outcome.reason}" for outcome in those] + [""]
    return "\n".join(lines)


def _row(
    group: dict[str, Any], swept: Sequence[str], own: Sequence[Outcome], metric: Metric
) -> str:
    mean, deviation = _mean(own, metric)
    speeds = [o.images_per_second for o in own if o.images_per_second is not None]
    told = [
        *(str(group.get(name, "")) for name in swept),
        f"{mean:.6g}",
        "" if math.isnan(deviation) else f"{deviation:.3g}",
        str(len(own)),
        f"{statistics.fmean(speeds):,.0f}" if speeds else "",
    ]
    return f"| {' | '.join(told)} |"


def _groups(done: Sequence[Outcome], without: Sequence[str] = ()) -> dict[Group, list[Outcome]]:
    """The trials by their parameters other than the seed and those of `without`."""
    groups: dict[Group, list[Outcome]] = collections.defaultdict(list)
    for outcome in done:
        named = outcome.trial.parameters().items()
        key = tuple((name, value) for name, value in named if name not in (SEED, *without))
        groups[key].append(outcome)
    return groups


def _ranked(groups: dict[Group, list[Outcome]], metric: Metric) -> list[Group]:
    """Best first; those without the metric last."""

    def badness(group: Group) -> float:
        mean, _ = _mean(groups[group], metric)
        return math.inf if math.isnan(mean) else -metric.sign * mean

    return sorted(groups, key=badness)


def _mean(own: Sequence[Outcome], metric: Metric) -> tuple[float, float]:
    """Mean and standard deviation; NaN where there are too few."""
    values = [x for x in (outcome.value(metric) for outcome in own) if not math.isnan(x)]
    return (
        statistics.fmean(values) if values else math.nan,
        statistics.stdev(values) if len(values) > 1 else math.nan,
    )


def _figure(directory: Path, done: Sequence[Outcome], metric: Metric) -> Path:
    """A panel for each parameter with several values: small points are trials, large ones means.

    Trials that diverged are grey triangles at the edge. Of a sweep that makes one change at a time
    it shows what each change gains instead.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = directory / "sweep.png"
    if changes := _changes(done):
        figure = Figure(figsize=(8, 1 + 0.24 * len(changes)), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_changes(figure.subplots(), _groups(done), changes, metric)
        figure.savefig(path, dpi=120)
        return path
    swept = _names(outcome.trial.parameters() for outcome in done)
    follow = _followers(done, swept)
    several = [name for name in swept if len(_values(done, name)) > 1]
    shown = [name for name in several if name not in (SEED, *follow)] or swept
    rows = math.ceil(len(shown) / _COLUMNS)
    columns = min(len(shown), _COLUMNS)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, axes in zip(shown, panels, strict=False):
        _draw(axes, done, name, metric, hidden=follow)
    for axes in list(figure.axes)[len(shown) :]:
        axes.remove()
    figure.savefig(path, dpi=120)
    return path


def _changes(done: Sequence[Outcome]) -> dict[str, Group]:
    """What was changed -> its trials, if the sweep makes one change at a time to its first setting.

    It does if not all settings change the same parameters, as in a random search, and if each value
    of a change belongs to a single setting: in a grid, values come again. A posterior may come with
    several ranks.
    """
    groups = _groups(done)
    first, *others = groups
    changed = {group: {k: v for k, v in group if (k, v) not in first} for group in others}
    values = [
        (field, value)
        for changes in changed.values()
        for field, value in changes.items()
        if field != POSTERIOR or len(changes) == 1
    ]
    is_one_at_a_time = len(set(values)) == len(values) and all(changed.values())
    if not is_one_at_a_time or len({frozenset(changes) for changes in changed.values()}) < 2:
        return {}
    return {_short(changes): group for group, changes in changed.items()}


def _short(changes: dict[str, Any]) -> str:
    """Such as `N=64, decoder=3x3/192 3x3/64…`: fields by the last part of their name."""
    return _cut(", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in changes.items()))


def _cut(text: str, most: int = _MOST_LETTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _draw_changes(
    axes: Any, groups: dict[Group, list[Outcome]], changes: dict[str, Group], metric: Metric
) -> None:
    """What each change adds to the mean of the first setting, whose spread is the grey band."""
    first = next(iter(groups.values()))
    mean, deviation = _mean(first, metric)
    done = [outcome for own in groups.values() for outcome in own]
    ends = _without_diverged(done, metric)
    for at, group in enumerate(changes.values()):
        value, spread = _mean(groups[group], metric)
        if ends is not None and metric.sign * value < metric.sign * ends[0]:
            axes.plot([ends[0] - mean], [at], "<" if metric.sign > 0 else ">", color="0.5")
            continue
        gains = metric.sign * (value - mean) > 0
        error = None if math.isnan(spread) else spread
        axes.errorbar([value - mean], [at], xerr=error, fmt="o", color="C0" if gains else "C3")
    axes.axvline(0, color="0.3", linewidth=0.8)
    if not math.isnan(deviation):
        axes.axvspan(-2 * deviation, 2 * deviation, color="0.9", zorder=0)
    axes.set_yticks(range(len(changes)), list(changes), fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.93", zorder=0)
    base = ", ".join(f"{field.rpartition('.')[2]}={value}" for field, value in next(iter(groups)))
    axes.set_xlabel(f"change of {metric.name}; grey: two standard deviations over seeds")
    # Of the figure, which is wider than the panel and lets no title out of it.
    title = textwrap.fill(f"One change at a time to {base} ({mean:.5g})", _LINE)
    axes.figure.suptitle(title, fontsize="medium")


def _draw(
    axes: Any, done: Sequence[Outcome], name: str, metric: Metric, hidden: Sequence[str]
) -> None:
    """The metric against one parameter: a line for each setting of the others but the hidden."""
    values = _values(done, name)
    numeric = all(isinstance(value, int | float) for value in values)
    place = {value: value if numeric else at for at, value in enumerate(values)}
    done = [o for o in done if name in o.trial.parameters()]
    if (ends := _without_diverged(done, metric)) is not None:
        edge = ends[0]
        far = [o for o in done if metric.sign * o.value(metric) < metric.sign * edge]
        x = [place[o.trial.parameters()[name]] for o in far]
        marker = "v" if metric.sign > 0 else "^"
        axes.plot(x, [edge] * len(x), marker, color="0.5", clip_on=False, zorder=3)
        axes.set_ylim(sorted(ends))
        done = [o for o in done if o not in far]
    groups = _groups(done, without=(name, *hidden))
    for at, (group, own) in enumerate(groups.items()):
        color = f"C{at % 10}"
        points = [(place[o.trial.parameters()[name]], o.value(metric)) for o in own]
        axes.plot(*zip(*points, strict=True), ".", color=color, alpha=0.5)
        here = {x: [o for o in own if place[o.trial.parameters()[name]] == x] for x, _ in points}
        means = [(x, *_mean(here[x], metric)) for x in sorted(here)]
        x, mean, deviation = zip(*means, strict=True)
        spread = [0 if math.isnan(d) else d for d in deviation]
        label = _short(dict(group)) or "nothing else set"
        line = "o-" if numeric else "o"
        axes.errorbar(x, mean, spread, fmt=line, color=color, capsize=3, label=label)
    axes.set_xlabel(name)
    axes.set_ylabel(metric.name)
    if numeric and min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC:
        axes.set_xscale("log")
    if not numeric or len(values) <= _MOST_TICKS:
        places = [place[value] for value in values]
        texts = [_cut(str(value), _LETTERS_OF_TICK) for value in values]
        axes.set_xticks(places, texts, rotation=30, horizontalalignment="right")
        axes.minorticks_off()
    if 1 < len(groups) <= _MOST_LABELS:
        axes.legend(fontsize="x-small")


def _followers(done: Sequence[Outcome], swept: Sequence[str]) -> list[str]:
    """Parameters that say nothing new: constant ones, and those that follow from an earlier one.

    So they do if each value of the earlier one has a single value of theirs, and comes with two
    settings on average: in a random search each value comes once, and nothing follows from it.
    """
    settings: list[dict[str | None, Any]] = [dict(group) for group in _groups(done)]
    found: list[str] = []
    for at, name in enumerate(swept):
        # `None`, the first, is no parameter: a constant follows from nothing.
        for other in (None, *(other for other in swept[:at] if other not in found)):
            values = {setting.get(other) for setting in settings}
            pairs = {(setting.get(other), setting.get(name)) for setting in settings}
            if len(pairs) == len(values) <= len(settings) / 2:
                found.append(name)
                break
    return found


def _without_diverged(done: Sequence[Outcome], metric: Metric) -> tuple[float, float] | None:
    """The worst and the best value to show, where some trials are far off; otherwise None.

    Far off is ten times as far from the best as the median is.
    """
    values = sorted(metric.sign * o.value(metric) for o in done if not math.isnan(o.value(metric)))
    if not values:
        return None
    best, distance = values[-1], values[-1] - statistics.median(values)
    if distance == 0 or values[0] >= best - 10 * distance:
        return None
    return metric.sign * (best - 10 * distance), metric.sign * (best + distance / 2)


def _values(done: Sequence[Outcome], name: str) -> list[Any]:
    """The values of a parameter, in the order in which they come."""
    return list(dict.fromkeys(p[name] for p in (o.trial.parameters() for o in done) if name in p))
