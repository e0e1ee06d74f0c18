"""What needs processes of its own: rivals, a process's start, its memory; and a whole run."""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.benchmark import candidates, stopwatch
from experiments.benchmark.stopwatch import Candidate, Record, say
from svae_jax import config as configs
from svae_jax.devices import runtime, sharding
from svae_jax.errors import UserError
from svae_jax.training import step

CELEBA_IMAGES = 162_770  # of its training split

_WARM_STARTS = 3
_MEGABYTE = 1e6

# ---------------------------------------------------------------------------------- processes


class Failed(UserError):
    """What a process of ours ended with."""


class Remote:
    """A candidate in a fresh process: neither threads nor settings of others disturb it."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def __call__(self, units: int) -> None:
        """Do so many units of work there, and wait for their end."""
        self._ask(units)

    def peaks(self) -> dict[str, int]:
        """The peaks of its memory in bytes, by kind."""
        return self._ask(0)

    def _ask(self, units: int) -> Any:
        try:
            self._connection.send(units)
            answer, error = self._connection.recv()
        except (EOFError, OSError):
            raise Failed("its process has died; out of memory?") from None
        if error is not None:
            raise Failed(error)
        return answer


@contextlib.contextmanager
def remote(make: Callable[..., Candidate], *args: Any, **kwargs: Any) -> Iterator[Remote]:
    """What `make(*args, **kwargs)` makes, in a process of its own, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, args, kwargs), daemon=True)
    process.start()
    there.close()  # so that the process's end is the connection's
    try:
        yield Remote(here)
    finally:
        with contextlib.suppress(OSError):
            here.send(None)
        process.join(timeout=10)
        process.kill()


def _serve(connection: Connection, make: Callable[..., Candidate], args: Any, kwargs: Any) -> None:
    watch, run = _Watch(), None
    while (units := connection.recv()) is not None:
        try:
            run = run or make(*args, **kwargs)
            answer = run(units) if units else watch.peaks()
        except Exception as error:
            connection.send((None, (str(error).strip() or repr(error)).splitlines()[0]))
        else:
            connection.send((answer, None))


# ---------------------------------------------------------------------------------- start

_CONFIG_FILE = """\
import json
from svae_jax import config
def get_config():
    return config.from_dict(json.loads({fields!r}))
"""


def start(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """Seconds from the start of `python -m svae_jax.main` to the end of its first step.

    It trains on a folder of generated pictures, which have been decoded and cached before.
    """
    del options
    from svae_jax import data

    config = ml_collections.ConfigDict(config.to_dict())
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _save_pictures(
            root / "pictures", candidates.generated_images(2 * config.batch_size, config)
        )
        dataset = config.dataset
        dataset.update(
            name="folder", data_dir=str(root / "pictures"), cache_dir=str(root / "cache")
        )
        dataset.update(split="all", eval_split="all")
        config.update(log_every=1, num_steps=1000)
        size = {"image_size": dataset.image_size, "channels": dataset.channels}
        data.load("folder", "all", data_dir=dataset.data_dir, cache_dir=dataset.cache_dir, **size)
        file = root / "config.py"
        file.write_text(_CONFIG_FILE.format(fields=json.dumps(config.to_dict())))
        cold = _seconds_to_first_step(file, root / "cold", root / "compiled")
        warm = [
            _seconds_to_first_step(file, root / f"warm{i}", root / "compiled")
            for i in range(_WARM_STARTS)
        ]
    return [
        {"compilation cache": "cold", "s to first step": cold},
        {"compilation cache": "warm", "s to first step": float(np.median(warm))},
    ]


def _save_pictures(directory: Path, images: candidates.Images) -> None:
    from PIL import Image

    directory.mkdir()
    for i, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.save(directory / f"{i:04d}.png")


def _seconds_to_first_step(config: Path, workdir: Path, compiled: Path) -> float:
    say(f"  a process with {workdir.name} compilation cache")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "svae_jax.main", f"--config={config}", f"--workdir={workdir}"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stderr or ():
            if line.startswith("step 1/"):
                return time.perf_counter() - begin
            lines.append(line)
    finally:
        process.kill()
        process.communicate()
    raise RuntimeError("svae_jax.main made no step:\n" + "".join(lines[-20:]))


# ---------------------------------------------------------------------------------- memory


def memory(
    config: ml_collections.ConfigDict,
    options: argparse.Namespace,
    num_images: int = CELEBA_IMAGES,
) -> list[Record]:
    """Peak memory and speed of training on so many images, resident and streamed.

    Each way has a process of its own, and so has the same on few images, with which they are
    compared. Peaks are those of the resident set, of its anonymous part (the rest are pages of the
    mapped file and of libraries, which the system takes back as it likes), and of the device where
    it is no CPU.
    """
    few = 2 * config.batch_size
    ways = {"few": (few, 1.0), "resident": (num_images, 1.0), "streamed": (num_images, 0.0)}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        path = Path(temporary) / "images.npy"
        image = math.prod(configs.recipe(config, 1).image_shape)
        say(f"  writing {num_images * image / _MEGABYTE:,.0f} MB of images")
        _write_images(path, num_images, config)
        fields = config.to_dict()
        runs = {
            name: stack.enter_context(remote(_mapped_training, fields, path, count, share))
            for name, (count, share) in ways.items()
        }
        times = stopwatch.in_turn(runs, options.seconds)
        peaks = {name: run.peaks() for name, run in runs.items()}
    records = []
    for name, (count, _) in ways.items():
        record = {"images": name, "array MB": count * image / _MEGABYTE}
        for kind, peak in peaks[name].items():
            growth = peak - peaks["few"][kind]
            record |= {f"{kind} MB": peak / _MEGABYTE, f"{kind} growth MB": growth / _MEGABYTE}
            record[f"{kind} growth / array"] = growth / (count * image)
        record |= stopwatch.throughput(times[name], config.batch_size)
        record["/ resident"] = stopwatch.ratio(times["resident"], times[name])
        records.append(record)
    return records


def _write_images(path: Path, count: int, config: ml_collections.ConfigDict) -> None:
    """A stand-in for a cached data set: mapped into memory, as the real one is."""
    block = candidates.generated_images(1000, config)
    try:
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *block.shape[1:]))
        for begin in range(0, count, len(block)):
            array[begin : begin + len(block)] = block[: count - begin]
        array.flush()
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error}; set TMPDIR elsewhere") from None


def _mapped_training(fields: Mapping[str, Any], path: Path, count: int, share: float) -> Candidate:
    runtime.keep_freed_memory()  # as `svae_jax.main` does
    config = configs.from_dict(fields)
    images = np.load(path, mmap_mode="r")[:count]
    return candidates.training(candidates.recipe_of(config, len(images)), images, share)


class _Watch:
    """The peaks of this process's memory, in bytes; those without a counter are sampled."""

    def __init__(self):
        self._anonymous = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while (now := _status("RssAnon")) is not None:
            self._anonymous = max(self._anonymous, now)
            time.sleep(0.02)

    def peaks(self) -> dict[str, int]:
        """By kind, those that this system knows."""
        stats = jax.devices()[0].memory_stats() or {}
        peaks = {
            "resident set": _status("VmHWM"),
            "anonymous": self._anonymous or None,
            "device": stats.get("peak_bytes_in_use"),
        }
        return {kind: peak for kind, peak in peaks.items() if peak is not None}


def _status(field: str) -> int | None:
    """Bytes that Linux tells of this process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


# ---------------------------------------------------------------------------------- a whole run


def whole_run(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """The throughput of a whole run, and of the bare training step before and after it.

    From the run's second log (before it, some is compiled) to its last checkpoint on disk, without
    the evaluation: logs, samples and checkpoints occur as often as the configuration says.
    """
    from svae_jax.training import loop  # and with it Orbax, without which the other parts do

    config = ml_collections.ConfigDict(config.to_dict())
    config.num_steps = max(3 * config.log_every, config.sample_every, config.checkpoint.every)
    images = candidates.generated_images(candidates.NUM_IMAGES, config)
    with tempfile.TemporaryDirectory() as temporary:
        job = loop.Job(
            config=config,
            directory=Path(temporary) / "run",
            mesh=sharding.make_mesh(),
            recipe=candidates.recipe_of(config, len(images)),
            train_images=images,
            eval_images=images[: config.batch_size],
            num_steps=config.num_steps,
        )
        _prepare(job, Path(temporary) / "other")
        bare = {"bare step": candidates.bare_training(job.recipe, images)}
        before = stopwatch.in_turn(bare, options.seconds / 2)["bare step"]
        say(f"  a run of {config.num_steps} updates")
        job.directory.mkdir()
        clock = _Clock(sys.stderr)
        with contextlib.redirect_stderr(clock):
            loop.run(job)
        seconds = time.perf_counter() - clock.logs[1] - clock.evaluation
        after = stopwatch.in_turn(bare, options.seconds / 2)["bare step"]
    timed = config.num_steps - 2 * config.log_every
    rate = timed * config.batch_size / seconds
    rows = {
        "bare step, before": stopwatch.throughput(before, config.batch_size),
        f"run, {timed} updates": {"images/s": rate},
        "bare step, after": stopwatch.throughput(after, config.batch_size),
    }
    return [
        {"what": name} | row | {"run / it": rate / row["images/s"]} for name, row in rows.items()
    ]


def _prepare(job: Any, directory: Path) -> None:
    """Import and compile what a run needs once, and may meet late."""
    from svae_jax.evaluation import pictures
    from svae_jax.run.writer import Writer

    with Writer(directory) as writer:
        writer.write_scalars(0, {"train/loss": 0.0})  # imports TensorFlow
    init = jax.jit(lambda: step.init_state(job.recipe), out_shardings=sharding.replicated(job.mesh))
    images = (job.train_images, job.eval_images)
    pictures.draw(job.recipe, step.evaluated_variables(init()), *images, job.config.sample_every)


class _Clock(io.TextIOBase):
    """Passes on what a run tells, and keeps when: its logs, and how long evaluations took."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.logs: list[float] = []
        self.evaluation = 0.0

    def write(self, text: str) -> int:
        """Pass on."""
        now = time.perf_counter()
        if "eval: " in text:
            self.evaluation += now - self.logs[-1]  # it begins where training is logged
        elif text.startswith("step "):
            self.logs.append(now)
        return self._stream.write(text)
