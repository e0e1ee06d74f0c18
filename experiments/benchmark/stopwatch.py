"""What the timing experiments share: measuring in turn, tables, and the command line.

Whatever is compared runs in turn: each round calls every candidate once, so that a machine which
slows down or is busy meanwhile does so for all, and a ratio is the median of the rounds' ratios.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import ml_collections
import numpy as np
from absl import flags
from jaxtyping import Float
from ml_collections import config_flags

from svae_jax.devices import runtime
from svae_jax.errors import UserError

# Does so many units of work (updates, batches of images), and returns when they are done.
Candidate = Callable[[int], None]

# One row of a table, and of the JSON file: numbers and texts by the name of their column.
Record = dict[str, Any]

_LEAST_ROUNDS = 5
_ROUNDS = 10  # aimed at: so much work is done at a call that about so many fill the time

_BUSY = 0.1  # share of all cores, from which on other processes are worth a warning

_LIBRARIES = ("svae_jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch")


class Timed(NamedTuple):
    """What a candidate took.

    Attributes:
        seconds: a unit of work, in each round.
        units: how many were timed, over all rounds.
    """

    seconds: Float[np.ndarray, " rounds"]
    units: int


def in_turn(candidates: Mapping[str, Candidate], seconds: float) -> dict[str, Timed]:
    """Time candidates in turn, after warming them up.

    Args:
        candidates: what is timed, by name.
        seconds: to spend on measuring all of them; at least 5 rounds are made.
    """
    say(f"  warming up {', '.join(candidates)}")
    units = {
        name: _units(run, seconds / (_ROUNDS * len(candidates))) for name, run in candidates.items()
    }
    if (busy := _busy_share()) > _BUSY:
        say(
            f"  NOTE: other processes take {busy:.0%} of the cores; all is slower, and on a CPU "
            "PyTorch much more so, whose threads wait for each other"
        )
    say(f"  measuring for about {seconds:.0f} s")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < _LEAST_ROUNDS:
        for name in order:
            times[name].append(_time(candidates[name], units[name]) / units[name])
        order.reverse()  # none always follows the same other
    return {
        name: Timed(np.asarray(values), units[name] * len(values)) for name, values in times.items()
    }


def _busy_share() -> float:
    """The share of the cores that is busy, while this process is not; 0 where it is not known."""
    before = _idle_and_all()
    time.sleep(0.5)
    after = _idle_and_all()
    if before == after:
        return 0.0
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _idle_and_all() -> tuple[int, int]:
    """Ticks since the machine's start, as Linux tells them."""
    stat = Path("/proc/stat")
    ticks = [int(n) for n in stat.read_text().split()[1:9]] if stat.exists() else [0] * 5
    return ticks[3] + ticks[4], sum(ticks)


def _units(run: Candidate, seconds: float) -> int:
    """How many units of work fill the time; measured after a first one, which may compile."""
    run(1)
    units = 1
    while (taken := _time(run, units)) < 0.5 * seconds:
        units *= 2
    return max(1, round(units * seconds / taken))


def _time(run: Candidate, units: int) -> float:
    begin = time.perf_counter()
    run(units)
    return time.perf_counter() - begin


def throughput(timed: Timed, images: int) -> Record:
    """Columns for images a second: median and quartiles, for so many images a unit of work."""
    low, median, high = (float(x) for x in np.percentile(images / timed.seconds, (25, 50, 75)))
    return {"images/s": median, "from": low, "to": high, "rounds": len(timed.seconds)}


def ratio(numerator: Timed, denominator: Timed) -> float:
    """The median of the rounds' ratios of time."""
    return float(np.median(numerator.seconds / denominator.seconds))


def table(records: Sequence[Record]) -> str:
    """Records as an aligned Markdown table; a record that lacks a column leaves it empty."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    rows = [columns, *([_text(record.get(name)) for name in columns] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def _text(value: object) -> str:
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
        return f"{value:,.{digits}f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def environment() -> dict[str, Any]:
    """The device, the processor and the versions of what is installed."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    installed = {}
    for name in _LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def precision(config: ml_collections.ConfigDict) -> str:
    """What is computed in; a GPU rounds float32 factors to TF32, here in all implementations."""
    rounds = config.model.dtype == "float32" and jax.default_backend() == "gpu"
    return config.model.dtype + (" (products in TF32)" if rounds else "")


def heading(environment: Mapping[str, Any]) -> str:
    """The environment in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['devices']} x {environment['device']} ({environment['platform']}), "
        f"{environment['processor']}, {environment['cores']} cores\n"
        f"{versions}"
    )


def say(line: str) -> None:
    """Tell on stderr what is under way; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Options of an experiment; `--config.FIELD=VALUE` are left to `load_config`.

    Raises:
        UserError: on parsing, for a mistake in the options.
    """

    def __init__(self, doc: str, default_config: str):
        """Explain the experiment by its module's docstring, and define the common options."""
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        option = self.add_argument
        option(
            "--config",
            default=default_config,
            help=f"configuration (default: {default_config}); its fields are given as "
            "--config.FIELD=VALUE",
        )
        option("--json", type=Path, help="file to write the results to, as JSON")
        option(
            "--seconds",
            type=float,
            default=20.0,
            help="time to spend on each measurement, compilation not counted (default: 20)",
        )
        option(
            "--generation_batch",
            type=int,
            default=1000,
            help="images generated at a time (default: 1000)",
        )

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and what overrides fields of the configuration."""
        options, rest = self.parse_known_args(argv)
        for argument in rest:
            if not argument.startswith("--config.") or "=" not in argument:
                self.error(
                    f"unexpected argument {argument!r}; fields are given as "
                    "--config.FIELD=VALUE; see --help"
                )
        if not 0 < options.seconds < float("inf"):
            self.error(f"--seconds={options.seconds} must be a number above 0")
        if options.generation_batch < 1:
            self.error(f"--generation_batch={options.generation_batch} must be at least 1")
        if options.json is not None and not options.json.absolute().parent.is_dir():
            self.error(f"--json={options.json}: there is no such directory")
        return options, rest

    def error(self, message: str) -> NoReturn:
        """Tell a mistake in one line, without the usage that argparse would print."""
        raise UserError(message)


def load_config(path: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The configuration of a file, such as `configs/celeba.py:lowrank`, with fields overridden.

    Raises:
        UserError: a file or a field that does not exist, or a value of the wrong type.
    """
    if not Path(path.partition(":")[0]).is_file():
        raise UserError(f"--config={path}: there is no such file")
    values = flags.FlagValues()  # of its own: a process may load several configurations
    argv = ["", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (AttributeError, KeyError) as error:
        raise UserError(f"{error}: no such field, of {', '.join(overrides)}") from None
    except flags.Error as error:
        # A config file's own error is the last line of a traceback.
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from None
    return values.config


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results as JSON, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """The command line: a user's mistake is one line and exit code 2."""
    # A GPU's memory is shared with PyTorch, and with processes that are measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.keep_freed_memory()  # as `svae_jax.main` does
    try:
        main(sys.argv[1:])
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
