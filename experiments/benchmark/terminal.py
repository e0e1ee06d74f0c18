"""What a user reads: the machine that results are from, and their tables."""

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
from svae_jax.analysis import tables
from svae_jax.devices import runtime, sharding


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
    """Records as an aligned Markdown table."""
    return tables.markdown([{name: _text(x) for name, x in row.items()} for row in records])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 3}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
