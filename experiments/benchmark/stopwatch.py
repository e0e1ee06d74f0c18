"""Measures contenders in turn, so that ratios do not depend on the state of the machine.

Each round calls every contender once. A machine that slows down or is busy for a while does so for
all of them, and a ratio is the median of the rounds' ratios.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from svae_jax import terminal

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


def throughput(seconds: Seconds, images: int) -> Record:
    """Columns for images a second, where a unit of work is so many images."""
    low, median, high = (float(x) for x in np.percentile(images / seconds, (25, 50, 75)))
    quartiles = {"lower quartile": low, "upper quartile": high}
    return {"images/s": median, **quartiles, "rounds": len(seconds)}


def ratio(numerator: Seconds, denominator: Seconds) -> float:
    """The median of the rounds' ratios of time."""
    return float(np.median(numerator / denominator))


def say(line: str) -> None:
    """Prints progress to stderr; results go to stdout."""
    terminal.say(line)
