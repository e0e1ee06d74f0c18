"""What a table of results needs: the machine and the libraries, the table, a file."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from experiments.benchmark.stopwatch import Record
from svae_jax.devices import runtime, sharding


def begin(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What decides about speed: the configuration, the machine and the libraries; printed too."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    torch = importlib.util.find_spec("torch")
    environment = {
        **sharding.describe(sharding.make_mesh()),
        "processor": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **runtime.versions(),
        "torch": importlib.metadata.version("torch") if torch else None,
    }
    config_line = (config.dataset.name, config.latent.name, config.model.dtype)
    print(*config_line, f"batch {config.batch_size}", sep=", ")
    print(", ".join(f"{name} {value}" for name, value in environment.items()), flush=True)
    return {"config": config.to_dict(), "environment": environment}


def table(records: Sequence[Record]) -> str:
    """Records as an aligned Markdown table; a record that lacks a column leaves it empty."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    rows = [columns, *([_text(record.get(name, "")) for name in columns] for record in records)]
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
