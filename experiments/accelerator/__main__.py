"""A quarter of an hour on an accelerator: measures what matters, most valuable first.

    python -m experiments.accelerator --budget=840 --out=DIR
    python -m experiments.accelerator --budget=840 --out=DIR --images=a.zip --images=b.zip

No TensorFlow, no TFDS and no network are needed. The parts, by --parts:

    device            its name, the libraries, how fast it copies and multiplies matrices
    posteriors        20 training steps of each posterior beside a CPU's; kernels of a step
    speed             vector and lowrank: training at two batch sizes, generation
    pytorch           the same beside PyTorch, eager and compiled
    train_best        the model `best` on real images, with held-out bounds
    samplers, flow    its samplers, and a grid of samples
    train_mvn, train_lowrank, train_vector
    profile, sharing, memory

A part may take its share of the time that is left. What it has not used goes to later parts; one
that fails or takes too long is reported and passed over. DIR receives results.json and results.md,
written anew after each row, and samples.png and profile.json.gz.

Real images come as files that `experiments.accelerator.packing` writes. Measure on one device: with
several GPUs, set CUDA_VISIBLE_DEVICES=0.
"""

import itertools
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import options as command
from experiments.accelerator import packing
from experiments.accelerator.parts import PARTS
from experiments.accelerator.sizes import BY_SHAPE, FULL, TINY, Context, Row
from experiments.accelerator.speed import goals
from experiments.accelerator.worker import GRACE, Worker
from experiments.benchmark import stopwatch
from svae_jax import files, image_files
from svae_jax.data import cache
from svae_jax.errors import UserError
from svae_jax.files import os_errors_for_user, replacing
from svae_jax.run import interrupt
from svae_jax.terminal import say

_LEAST = 5.0  # seconds that a part gets; with fewer left, none is begun


def main(argv: Sequence[str]) -> int:
    """Runs the parts; returns 0, or 128 plus the number of the signal that ended it."""
    begin = time.monotonic()
    options = _parse(argv)
    # Other processes use the device's memory too, and programs are compiled once for all of them.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.home() / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of processes it kills
    image_files.check_target(options.out, "png")
    end = begin + options.budget - GRACE
    with Worker() as worker, interrupt.listening() as request:
        platform = worker.start()
        if platform == "cpu":
            if not options.allow_cpu:
                raise UserError("JAX finds no accelerator; with --allow_cpu it runs on the CPU")
            say("no accelerator: this runs on the CPU, as --allow_cpu says")
        _run(options, worker, end, request)
    taken = time.monotonic() - begin
    say(f"{taken:.0f} s of {options.budget} s; results are in {options.out}/results.md")
    return 128 + request.signal_number if request.signal_number else 0


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("budget", None, "seconds for all parts", 60, flag_values=values)
    flags.mark_flag_as_required("budget", values)
    command.define_path("out", "directory for the results; an empty or new one", values)
    command.define_list("images", [], "files of packed images", values)
    allowed = f"among {', '.join(PARTS)}"
    command.define_list("parts", [], f"{allowed} (default: all)", values)
    flags.register_validator(
        "parts",
        lambda parts: PARTS.keys() >= set(filter(None, parts)),
        f"must be {allowed}",
        values,
    )
    flags.DEFINE_bool("allow_cpu", False, "run although there is no accelerator", values)
    flags.DEFINE_bool("tiny", False, "tiny networks and few steps: only a rehearsal", values)


class _Options(NamedTuple):
    """The flags of the command."""

    budget: int
    out: Path
    images: tuple[Path, ...]
    parts: tuple[str, ...]
    allow_cpu: bool
    tiny: bool


def _parse(argv: Sequence[str]) -> _Options:
    values = command.parse(argv, __doc__, _define)
    images = tuple(map(Path, filter(None, values.images)))
    if images and (shape := packing.image_shape(images)) not in BY_SHAPE:
        known = " and ".join(map(str, BY_SHAPE))
        raise UserError(f"--images: they are of shape {shape}; possible are {known}")
    parts = tuple(filter(None, values.parts)) or tuple(PARTS)
    return _Options(values.budget, values.out, images, parts, values.allow_cpu, values.tiny)


def _run(options: _Options, worker: Worker, end: float, request: interrupt.Request) -> None:
    """Runs each part within its share of the time that is left; writes after each row."""
    words = f"python -m experiments.accelerator {shlex.join(sys.argv[1:])}"
    report: dict[str, Any] = {"command": words, "budget": options.budget, "parts": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for i, name in enumerate(options.parts):
            rows: list[Row] = []
            begin = time.monotonic()
            entry = {"status": "running", "limit": 0.0, "seconds": 0.0, "rows": rows}
            report["parts"][name] = entry

            def add(row: Row, rows: list[Row] = rows) -> None:
                rows.append(row)
                _write(options.out, report)

            why = _skipped(name, options, end - begin, request)
            if why is None:
                later = [PARTS[p].share for p in options.parts[i:] if _can_run(p, options)]
                limit = max((end - begin) * PARTS[name].share / sum(later), _LEAST)
                say(f"{name}: at most {limit:.0f} s")
                context = Context(
                    sizes=TINY if options.tiny else FULL,
                    images=options.images,
                    out=options.out,
                    scratch=Path(scratch),
                    results=_rows(report),
                )
                entry["status"] = worker.run(name, context, limit, add, request)
                entry |= {"limit": limit, "seconds": time.monotonic() - begin}
            else:
                entry["status"] = f"skipped: {why}"
            _write(options.out, report)
            print("\n".join(_section(name, entry)), flush=True)


def _skipped(name: str, options: _Options, left: float, request: interrupt.Request) -> str | None:
    """Why a part is not begun; None if it is."""
    if request.signal_number:
        return f"stopped by {signal.Signals(request.signal_number).name}"
    if not _can_run(name, options):
        return "no --images"
    return "the budget is out" if left < _LEAST else None


def _rows(report: Mapping[str, Any]) -> dict[str, list[Row]]:
    return {name: entry["rows"] for name, entry in report["parts"].items()}


def _can_run(name: str, options: _Options) -> bool:
    return bool(options.images) or not PARTS[name].needs_images


def _write(out: Path, report: Mapping[str, Any]) -> None:
    files.write_json(out / "results.json", dict(report))
    lines = [f"`{report['command']}`", "", stopwatch.table(goals(_rows(report)))]
    for name, entry in report["parts"].items():
        lines += _section(name, entry)
    path = out / "results.md"
    with os_errors_for_user(f"{path} cannot be written"), replacing(path) as file:
        file.write("\n".join([*lines, ""]).encode())


def _section(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """A part in Markdown: how it ended, and a table for each run of rows with the same columns."""
    yield f"\n## {name}: {entry['status']}"
    if entry["seconds"]:
        yield f"\n{entry['seconds']:.0f} s of at most {entry['limit']:.0f} s."
    for _, rows in itertools.groupby(entry["rows"], key=tuple):
        yield f"\n{stopwatch.table(list(rows))}"


if __name__ == "__main__":
    command.run_command(main)
