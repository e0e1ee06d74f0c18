"""What a sweep has found: `sweep.csv`, `sweep.md` and the figure `sweep.png` in its directory."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.sweep import trial as trials
from experiments.sweep.trial import Outcome
from svae_jax import files
from svae_jax.analysis import tables
from svae_jax.errors import UserError

_MOST_LINES = 10  # of a panel with a legend
_MOST_TICKS = 8  # of a parameter, one at each of its values
_COLUMNS = 3  # of panels
_LOGARITHMIC = 20  # the ratio of a parameter's values from which its axis is logarithmic
_DIVERGED = 10  # as far from the best trial as the median one, times this


def write(directory: Path, title: str, found: Sequence[Outcome], metric: str) -> list[Path]:
    """Writes the files of a report; the figure needs a trial that is done.

    Returns:
        The files that were written.

    Raises:
        UserError: no finished trial has the metric (the message lists those there are), or a file
            cannot be written.
    """
    rows = table(found)
    done = rows[rows.status == trials.DONE]
    if len(done) and _numbers(done, metric).isna().all():
        known = ", ".join(sorted({name for outcome in found for name in outcome.metrics}))
        raise UserError(f"--metric={metric}: the trials have {known}")
    csv, page, *picture = (
        directory / f"sweep.{suffix}" for suffix in ("csv", "md", *["png"] * bool(len(done)))
    )
    with files.os_errors_for_user(f"--workdir={directory} cannot be written"):
        rows.to_csv(csv, index=False)
        page.write_text(markdown(title, rows, metric))
        for path in picture:
            figure(done, metric).savefig(path, dpi=120)
    return [csv, page, *picture]


def table(found: Sequence[Outcome]) -> pd.DataFrame:
    """One row a trial; the parameters stand between `status` and `step`."""
    parts: list[Callable[[Outcome], Mapping[str, Any]]] = [
        lambda o: {"trial": o.trial.name, "status": o.status},
        lambda o: o.trial.parameters(),
        lambda o: {"step": o.step},
        lambda o: o.metrics,
        lambda o: {"images_per_second": o.images_per_second, "num_parameters": o.num_parameters},
        lambda o: {"reason": o.reason, "workdir": str(o.trial.workdir)},
    ]
    return pd.concat([pd.DataFrame(map(part, found), dtype=object) for part in parts], axis=1)


def markdown(title: str, rows: pd.DataFrame, metric: str) -> str:
    """The text of `sweep.md`."""
    counts = rows.status.value_counts(sort=False)
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    parts = [f"# Sweep {title}", f"{len(rows)} trials: {states}."]
    done = rows[rows.status == trials.DONE]
    values = _numbers(done, metric)
    if values.notna().any():
        best = (trials.sign(metric) * values).idxmax()
        parts.append(f"Best {metric}: {values[best]:.6g}, by {rows.trial[best]}.")
    if len(done):
        settings = _settings(done, metric)
        # Best first; those without the metric last.
        order = (-trials.sign(metric) * settings["mean"]).sort_values(kind="stable").index
        texts = {
            metric: settings["mean"].map("{:.6g}".format),
            "standard deviation over seeds": settings["std"].map("{:.3g}".format, "ignore"),
            "trials": settings["size"].map(str),
            "images/s": settings["speed"].map("{:,.0f}".format, "ignore"),
        }
        shown = settings[_swept(done)].assign(**texts).loc[order].astype(object)
        parts.append(tables.markdown(shown.fillna("").to_dict("records")))
        parts.append(f"![{metric} against each parameter](sweep.png)")
    for status in (trials.FAILED, trials.PRUNED):
        those = rows[rows.status == status]
        if len(those):
            lines = [f"- `{row.trial}`: {row.reason}" for row in those.itertuples()]
            parts += [f"## {status.capitalize()}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def figure(done: pd.DataFrame, metric: str) -> Any:
    """A panel for each parameter: means over seeds, with a line for each setting of the others.

    Settings that diverged are grey triangles at the edge. Of a sweep that makes one change at a
    time it shows what each change gains instead.

    Args:
        done: the rows of trials that are done.
        metric: what is drawn.
    """
    from matplotlib.figure import Figure

    settings, swept = _settings(done, metric), _swept(done) or ["status"]
    if changes := _changes(settings[swept]):
        drawn = Figure(figsize=(8, 1 + 0.24 * len(changes)), layout="constrained")
        _draw_changes(drawn.subplots(), settings, changes, metric)
        return drawn
    varied = _varied(settings[swept])
    several = [name for name in varied if settings[name][settings[name] != ""].nunique() > 1]
    panels = several or swept[:1]
    rows, columns = math.ceil(len(panels) / _COLUMNS), min(len(panels), _COLUMNS)
    drawn = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for at, name in enumerate(panels):
        axes, others = drawn.add_subplot(rows, columns, at + 1), [x for x in varied if x != name]
        _draw(axes, settings[settings[name] != ""], name, others, metric)
    return drawn


def _numbers(rows: pd.DataFrame, name: str) -> pd.Series:
    """A column as floats; NaN where there is none."""
    return pd.to_numeric(rows.get(name, pd.Series(math.nan, rows.index))).astype(float)


def _swept(rows: pd.DataFrame) -> list[str]:
    """The parameters of these trials, without the seed."""
    names = rows.loc[:, "status":"step"].columns[1:-1]  # type: ignore[misc]
    return [name for name in names if name != trials.SEED and rows[name].notna().any()]


def _settings(done: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row for each setting of the parameters but the seed, as text, and what its trials say."""
    swept = _swept(done)
    texts = done[swept].map(lambda value: "" if pd.isna(value) else str(value)).assign(
        status=done.status, value=_numbers(done, metric), speed=_numbers(done, "images_per_second")
    )  # fmt: skip
    return texts.groupby(swept or ["status"], sort=False, as_index=False).agg(
        mean=("value", "mean"), std=("value", "std"), size=("value", "size"),
        speed=("speed", "mean"),
    )  # fmt: skip


def _changes(settings: pd.DataFrame) -> list[dict[str, str]]:
    """What each setting but the first changes, if the sweep makes one change at a time to that.

    It does if not all settings change the same parameters, as in a random search, and if each value
    of a change belongs to a single setting: in a grid, values come again. A posterior may come with
    several ranks.
    """
    first, *others = settings.to_dict("records")
    found = [{name: x for name, x in row.items() if x and x != first[name]} for row in others]
    values = [
        pair for own in found for pair in own.items() if pair[0] != trials.POSTERIOR or len(own) < 2
    ]
    is_single = all(found) and len(set(values)) == len(values)
    return found if is_single and len(set(map(frozenset, found))) > 1 else []


def _varied(settings: pd.DataFrame) -> list[str]:
    """The parameters that vary; of those that vary together only the first.

    Two that are different in every setting, as in a random search, do not vary together.
    """
    codes = settings.apply(lambda column: column.factorize()[0])
    repeats = codes.T.duplicated() & (codes.nunique() < len(codes))
    return list(codes.columns[(codes.nunique() > 1) & ~repeats])


def _short(setting: Mapping[str, str], most: int = 32) -> str:
    """Such as `N=64, decoder=3x3/192 3x3/64…`: fields by the last part of their name."""
    text = ", ".join(f"{field.rpartition('.')[2]}={x}" for field, x in setting.items() if x)
    return _cut(text, most)


def _cut(text: str, most: int = 32) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _diverged(settings: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, float]:
    """The settings of a panel with a column `far`, and where these are drawn."""
    sign = trials.sign(metric)
    scores = sign * settings["mean"]
    edge = scores.max() - _DIVERGED * (scores.max() - scores.median())
    return settings.assign(far=(scores < edge) & (edge < scores.max())), sign * edge


def _draw_changes(axes: Any, settings: pd.DataFrame, changes: Sequence[Any], metric: str) -> None:
    """What each change adds to the mean of the first setting, whose spread is the grey band."""
    settings, edge = _diverged(settings, metric)
    first, others = settings.iloc[0], settings.iloc[1:]
    near, far = others[~others.far], others[others.far]
    axes.errorbar(near["mean"] - first["mean"], near.index - 1, xerr=near["std"], fmt="o")
    left_or_right = "<" if trials.sign(metric) > 0 else ">"
    axes.plot([edge - first["mean"]] * len(far), far.index - 1, left_or_right, color="0.5")
    axes.axvline(0, color="0.3", linewidth=0.8)
    if pd.notna(first["std"]):
        axes.axvspan(-2 * first["std"], 2 * first["std"], color="0.9", zorder=0)
    axes.set_yticks(range(len(changes)), list(map(_short, changes)), fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"change of {metric}; grey: two standard deviations over seeds")
    # Of the figure, which is wider than the panel and lets no title out of it.
    setting = _short(first[: list(settings).index("mean")].to_dict(), most=1000)
    title = textwrap.fill(f"One change at a time to {setting} ({first['mean']:.5g})", 80)
    axes.figure.suptitle(title, fontsize="medium")


def _draw(axes: Any, settings: pd.DataFrame, name: str, others: list[str], metric: str) -> None:
    """The metric against one parameter."""
    settings, edge = _diverged(settings, metric)
    numbers = pd.to_numeric(settings[name], errors="coerce")
    is_number = numbers.notna().all()
    settings = settings.assign(at=numbers if is_number else settings[name].str.wrap(16))
    lines = settings[~settings.far].groupby(others or "far", sort=False)
    has_legend = 1 < len(lines) <= _MOST_LINES
    for _, rows in lines:
        rows = rows.sort_values("at") if is_number else rows
        label = _cut(", ".join(x or "-" for x in rows.iloc[0][others]), 40)
        style = {"fmt": "o-" if is_number else "o", "capsize": 3, "label": label}
        style |= {} if has_legend else {"color": "0.4"}  # a colour would mean nothing
        axes.errorbar(rows["at"], rows["mean"], rows["std"].fillna(0), **style)
    if settings.far.any():
        at, marker = settings["at"][settings.far], "v" if trials.sign(metric) > 0 else "^"
        axes.plot(at, [edge] * len(at), marker, color="0.5", clip_on=False, zorder=3)
    axes.set(xlabel=name, ylabel=metric)
    axes.tick_params("x", rotation=30)
    if is_number and numbers.min() > 0 and numbers.max() / numbers.min() >= _LOGARITHMIC:
        axes.set_xscale("log")
    if is_number and numbers.nunique() <= _MOST_TICKS:
        axes.set_xticks(numbers.unique(), [f"{x:g}" for x in numbers.unique()])
        axes.set_xticks([], minor=True)
    if has_legend:
        title = ", ".join(field.rpartition(".")[2] for field in others)
        axes.legend(fontsize="x-small", title=_cut(title), title_fontsize="x-small")
