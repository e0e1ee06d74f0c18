"""The command line in a process of its own, as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def arguments(config, workdir, **changed):
    """What turns the default configuration into this one, with some fields changed."""
    from configs import shapes
    from svae_jax.config import flatten

    default, wanted = (flatten(c.to_dict()) for c in (shapes.get_config(), config))
    fields = {name: value for name, value in wanted.items() if value != default[name]} | changed
    return [
        "--config=configs/shapes.py:lowrank",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def host_devices(count):
    """The environment of a process whose host counts as so many devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count} {flags}"}


def start(*args, before="", **environment):
    """Starts it; `before` is Python code that runs first in its process."""
    begin = (
        ["-c", f"{before}\nfrom svae_jax import command_line, main; command_line.run(main.main)"]
        if before
        else []
    )
    return subprocess.Popen(
        [sys.executable, *(begin or ["-m", "svae_jax.main"]), *args],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits for its end: exit code, stdout and stderr."""
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def run(*args, **environment):
    """Exit code, stdout and stderr of a whole call."""
    return finish(start(*args, **environment))
