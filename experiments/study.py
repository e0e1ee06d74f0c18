"""What the studies share, which train several runs and write what they found beside its table."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from experiments import options
from svae_jax import command_line, files
from svae_jax.devices import runtime
from svae_jax.files import os_errors_for_user


def begin(
    argv: Sequence[str], doc: str | None, define: Callable[[flags.FlagValues], object]
) -> tuple[flags.FlagValues, str]:
    """The flags of a study that trains in this process, and the file of its configuration.

    Raises:
        UserError: a mistake in the arguments.
    """
    values = options.parse(argv, doc, define, config="")
    file = options.config_path(values).partition(":")[0]
    runtime.keep_freed_memory()
    command_line.keep_programs()
    return values, file


def settings(
    name: str, argv: Sequence[str], config: ml_collections.ConfigDict, result: Mapping[str, Any]
) -> dict[str, Any]:
    """How a study was made: the command, the data, and what one of its runs says."""
    return {
        "dataset": config.dataset.name,
        "split": config.dataset.eval_split,
        "num_steps": result["step"],
        "batch_size": config.batch_size,
        "device": device(result["device"]),
        "versions": result["versions"],
        "command": shlex.join(["python", "-m", f"experiments.{name}", *argv]),
    }


def device(described: Mapping[str, Any]) -> str:
    """The device of a `result.json` in words; of CPU cores, those that this process may use."""
    if described["platform"] == "cpu":
        affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
        cores = len(affinity(0)) if affinity else os.cpu_count()
        return f"{cores} CPU core{'s' if cores != 1 else ''}"
    return f"{described['count']} x {described['kind']}"


def write(path: Path, content: dict[str, Any], render: Callable[[Any], str]) -> None:
    """Writes numbers to `path`.json, and the text that is made of them to `path`.md.

    Raises:
        UserError: a file cannot be written.
    """
    files.write_json(path.with_suffix(".json"), content)
    page = path.with_suffix(".md")
    with os_errors_for_user(f"{page} cannot be written"):
        page.write_text(render(content))
    print(f"written: {page}")
