"""What a user types and reads: options, and the table of results with the machine it is from."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.benchmark.stopwatch import Record, say
from svae_jax import command_line
from svae_jax.devices import runtime, sharding
from svae_jax.errors import UserError


def parse(argv: Sequence[str], doc: str, **lists: Sequence[str]) -> flags.FlagValues:
    """Parses --config, --json and --seconds, and `lists` of words, the first two by default.

    Raises:
        UserError: a mistake in the arguments.
    """
    if not any(re.match("--?config(=|$)", argument) for argument in argv):
        argv = [argv[0], "--config=configs/celeba.py:lowrank", *argv[1:]]
    values = flags.FlagValues()
    told = "configs/celeba.py:lowrank if none is given; --config.FIELD=VALUE sets a field"
    config_flags.DEFINE_config_file("config", None, told, values, sys_argv=list(argv))
    flags.DEFINE_float("seconds", 20.0, "time of each measurement", 1e-3, flag_values=values)
    flags.DEFINE_string("json", None, "file for the results", values)
    flags.register_validator(
        "json",
        lambda path: path is None or Path(path).absolute().parent.is_dir(),
        "there is no such directory",
        values,
    )
    for name, words in lists.items():
        told = f"of {', '.join(words)}"
        flags.DEFINE_list(name, list(words[:2]), told, values)
        flags.register_validator(name, set(words).issuperset, f"must be {told}", values)
    if "--help" in argv:
        print(f"{doc}\n{values.get_help()}")
        sys.exit()
    command_line.parse(values, argv)
    command_line.check_config_file(values)
    return values


def variant(values: flags.FlagValues, argument: str) -> ml_collections.ConfigDict:
    """The configuration of the same file and overrides, with `argument` after the colon."""
    path = config_flags.get_config_filename(values["config"]).partition(":")[0]
    config = runpy.run_path(path)["get_config"](argument)
    config.update_from_flattened_dict(config_flags.get_override_values(values["config"]))
    return config


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an experiment; a user's mistake becomes one line and exit code 2."""
    # A GPU's memory is shared with PyTorch, and with processes that are measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.keep_freed_memory()  # as `svae_jax.main` does
    try:
        main(sys.argv)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)


def begin(config: ml_collections.ConfigDict, model: str) -> dict[str, Any]:
    """What decides about speed: the configuration, the machine and the libraries; printed too."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    torch = importlib.util.find_spec("torch")
    environment = {
        **sharding.describe(sharding.make_mesh()),
        "processor": name[1] if name else platform.machine(),
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **runtime.versions(),
        "torch": importlib.metadata.version("torch") if torch else None,
    }
    print(config.dataset.name, model, f"batch {config.batch_size}", config.model.dtype, sep=", ")
    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    return {"config": config.to_dict(), "environment": environment}


def table(records: Sequence[Record]) -> str:
    """Records of the same columns as an aligned Markdown table."""
    rows = [list(records[0]), *(list(map(_text, record.values())) for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(path: str | None, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, if a path is given."""
    if path is not None:
        Path(path).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
