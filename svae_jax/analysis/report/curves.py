"""One metric of several runs over the updates, as inline SVG in the page's colours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from svae_jax.analysis.report.markup import Markup, tag

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 8, 40
_MOST_MARKED = 12  # points of a curve that are marked one by one

Points = list[tuple[float, float]]


def chart(metrics: Sequence[Sequence[Mapping[str, Any]]], name: str, title: str) -> Markup:
    """The chart of a metric; empty if no run has it.

    Args:
        metrics: for each run, the rows of its `metrics.jsonl`; run i has the class `run-i`.
        name: such as "eval/elbo".
        title: what a screen reader says.
    """
    curves = [
        [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
        for rows in metrics
    ]
    points = [point for curve in curves for point in curve]
    if not points:
        return Markup()
    steps, values = zip(*points, strict=True)
    x_high, y_ticks = max(steps), _ticks(min(values), max(values))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = x / (x_high or 1)
        up = (y - y_low) / (y_high - y_low)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for y in y_ticks:
        _, at = place(0.0, y)
        parts += [
            tag(
                "line",
                class_="grid",
                x1=f"{_LEFT}",
                x2=f"{_WIDTH - _RIGHT}",
                y1=f"{at}",
                y2=f"{at}",
            ),
            tag("text", _label(y), x=f"{_LEFT - 6}", y=f"{at + 4}", text_anchor="end"),
        ]
    for x in (x for x in _ticks(0.0, x_high) if x <= x_high):
        at, _ = place(x, y_low)
        anchor = "end" if at > _WIDTH - 30 else "middle"
        parts += [tag("text", _label(x), x=f"{at}", y=f"{_HEIGHT - 21}", text_anchor=anchor)]
    middle = f"{(_LEFT + _WIDTH - _RIGHT) / 2}"
    parts += [tag("text", "updates", x=middle, y=f"{_HEIGHT - 4}", text_anchor="middle")]
    for i, curve in enumerate(curves):
        parts += [_curve([place(*point) for point in curve], f"run-{i}")]
    return tag("svg", *parts, role="img", aria_label=title, viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def _curve(points: Points, run: str) -> Markup:
    path = "M" + "L".join(f"{x} {y}" for x, y in points) if points else ""
    dots = points if len(points) <= _MOST_MARKED else []
    marks = [tag("circle", cx=f"{x}", cy=f"{y}", r="2.5") for x, y in dots]
    return tag("g", tag("path", d=path), *marks, class_=f"curve {run}")


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count`, from below `low` or at it to `high` or above it.

    Values that differ by less than a millionth are taken for one.
    """
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-6 * size else size or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _label(value: float) -> str:
    """A tick as text; in a chart of few updates there may be halves."""
    return f"{round(value):,}" if value == round(value) else f"{np.round(value, 10):g}"
