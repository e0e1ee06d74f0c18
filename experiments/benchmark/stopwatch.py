"""Measures contenders in turn, and shows what was measured on which machine.

Each round calls every contender once. A machine that slows down or is busy for a while does so for
all of them, and a ratio is the median of the rounds' ratios.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from svae_jax.analysis import tables
from svae_jax.devices import runtime, sharding
from svae_jax.terminal import say

Contender = Callable[[int], None]  # does so many units of work, and returns when they are done
Seconds = Float[np.ndarray, " rounds"]  # for a unit of work
Record = dict[str, Any]  # a row of a table: values by column

_MIN_ROUNDS = 5
_ROUNDS = 10  # each call does as many units of work as give about so many rounds


def in_turn(contenders: Mapping[str, Contender], seconds: float) -> dict[str, Seconds]:
    """Times contenders in turn for about so many seconds, after warming them up.

    Returns:
        Seconds for a unit of work in each round, by the contender's name.
    """
    say(f"  warming up {', '.join(contenders)}")
    share = seconds / (_ROUNDS * len(contenders))
    units = {name: _units(run, share) for name, run in contenders.items()}
    say(f"  measuring for about {seconds:.0f} s")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < _MIN_ROUNDS:
        for name in order:
            times[name].append(_time(contenders[name], units[name]) / units[name])
        order.reverse()  # so that no contender always follows the same other one
    return {name: np.asarray(values) for name, values in times.items()}


def _units(run: Contender, seconds: float) -> int:
    """How many units of work take so long; measured after a first one, which may compile."""
    run(1)
    units = 1
    while (taken := _time(run, units)) < 0.5 * seconds:
        units *= 2
    return max(1, round(units * seconds / taken))


def _time(run: Contender, units: int) -> float:
    begin = time.perf_counter()
    run(units)
    return time.perf_counter() - begin


def ratio(numerator: Seconds, denominator: Seconds) -> float:
    """The median of the rounds' ratios of time."""
    return float(np.median(numerator / denominator))


def throughput(seconds: Seconds, images: int) -> Record:
    """Columns for images a second, where a unit of work is so many images."""
    low, median, high = (float(x) for x in np.percentile(images / seconds, (25, 50, 75)))
    quartiles = {"lower quartile": low, "upper quartile": high}
    return {"images/s": median, **quartiles, "rounds": len(seconds)}


def table(records: Sequence[Record]) -> str:
    """Records as an aligned Markdown table."""
    return tables.markdown([{name: _text(x) for name, x in row.items()} for row in records])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def environment() -> Record:
    """What decides about speed besides the configuration: the machine and the libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    torch = importlib.util.find_spec("torch")
    return {
        **sharding.describe(sharding.make_mesh()),
        "processor": name[1] if name else platform.machine(),
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **runtime.versions(),
        "torch": importlib.metadata.version("torch") if torch else None,
    }
