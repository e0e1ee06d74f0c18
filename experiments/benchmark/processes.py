"""Measurements in processes of their own: baselines, memory, and runs of `svae_jax.main`."""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.benchmark import workloads
from experiments.benchmark.stopwatch import Contender, Record, in_turn, ratio, throughput
from svae_jax import config as configs
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.terminal import say


class OwnProcess(ProcessPoolExecutor):
    """A contender in a process of its own, where no threads or settings of others disturb it."""

    def __init__(self, make: Callable[..., Contender], *args: Any):
        """Prepares for `make(*args)`, which the first call makes there; args are hashable."""
        super().__init__(1, multiprocessing.get_context("spawn"))
        self._make = (make, *args)

    def __call__(self, units: int) -> None:
        """Does so many units of work."""
        self.submit(_work, units, *self._make).result()


_made = functools.cache(lambda make, *args: make(*args))


def _work(units: int, *make: Any) -> None:
    try:
        _made(*make)(units)
    except Exception as error:  # not every error can be sent to another process
        raise UserError((str(error).strip() or repr(error)).splitlines()[0]) from None


def memory(
    config: ml_collections.ConfigDict, seconds: float, num_images: int = 162_770
) -> list[Record]:
    """Memory and speed of training on so many images, resident and streamed; CelebA's by default.

    Training on two batches shows what a process takes without the images. Memory is, on Linux, the
    peak of the resident set and its anonymous part at the end (the rest is mapped files, which the
    system takes back as it likes); and the peak of a device that has memory of its own.
    """
    few = 2 * config.batch_size
    ways = {"few": (few, 1.0), "resident": (num_images, 1.0), "streamed": (num_images, 0.0)}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = f"{directory}/images.npy"
        noise = workloads.noise(config, 1000)
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (num_images, *noise.shape[1:]))
        for begin in range(0, num_images, len(noise)):
            array[begin : begin + len(noise)] = noise[: num_images - begin]
        runs = {
            name: stack.enter_context(OwnProcess(_mapped_training, config.to_json(), path, *way))
            for name, way in ways.items()
        }
        times = in_turn(runs, seconds)
        peaks = {name: run.submit(_megabytes).result() for name, run in runs.items()}
    return [
        {"images": name, "array, MB": count * noise[0].nbytes / 1e6}
        | peaks[name]
        | throughput(times[name], config.batch_size)
        | {"speed / resident": ratio(times["resident"], times[name])}
        for name, (count, _) in ways.items()
    ]


def _mapped_training(config_json: str, path: str, count: int, share: float) -> Contender:
    runtime.keep_freed_memory()  # as `svae_jax.main` does
    config = configs.from_dict(json.loads(config_json))
    images = np.load(path, mmap_mode="r")[:count]
    return workloads.training(workloads.recipe(config, count), images, share)


def _megabytes() -> Record:
    """Columns for the memory of this process."""
    status = Path("/proc/self/status")
    kilobytes = re.findall(r"(\w+):\s+(\d+) kB", status.read_text() if status.exists() else "")
    known = {name: int(number) * 1.024e-3 for name, number in kilobytes}
    columns = {"resident set, MB": "VmHWM", "anonymous, MB": "RssAnon"}
    found = {column: known[name] for column, name in columns.items() if name in known}
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found | ({} if device is None else {"device, MB": device / 1e6})


def whole_run(config: ml_collections.ConfigDict, seconds: float) -> list[Record]:
    """Seconds to the first step of `svae_jax.main`, and its throughput with all that it writes.

    It trains on the embedded data set, which is decoded and cached before. Throughput is measured
    from its first log to its last, with pictures and a checkpoint in between and no evaluation,
    and compared with that of training steps alone, before and after.
    """
    from svae_jax import data  # imports TFDS, which the other parts do without

    config = configs.from_dict(config.to_dict())
    size, dataset = config.batch_size, config.dataset
    dataset.update(name="shapes", data_dir="", channels=3, split="train", eval_split="test")
    num_steps = max(config.sample_every, config.checkpoint.every) + config.log_every
    config.update(num_steps=num_steps, eval_every=num_steps, importance_samples=0)
    for split in ("train", "test"):
        data.load_of(dataset.to_dict(), None, split)
    contender = workloads.training(workloads.recipe(config), workloads.noise(config))

    def alone() -> float:
        (taken,) = in_turn({"training steps alone": contender}, seconds / 2).values()
        return throughput(taken, size)["images/s"]

    with tempfile.TemporaryDirectory() as directory:
        cold, warm = (_log_times(config, directory, n, num_steps=1) for n in ("cold", "warm"))
        before = alone()
        say(f"  a run of {num_steps} training steps")
        run = _log_times(config, directory, "run")
        after = alone()
    begin, *_, end = run
    rows = {
        "seconds to the first step, nothing compiled before": cold[1],
        "seconds to the first step, all compiled before": warm[1],
        f"images/s of the run, {end - begin} training steps":
            (end - begin) * size / (run[end] - run[begin]),
        "images/s of training steps alone, before": before,
        "images/s of training steps alone, after": after,
    }  # fmt: skip
    return [{"measured": name, "value": value} for name, value in rows.items()]


def _log_times(
    config: ml_collections.ConfigDict, directory: str, name: str, **changed: int
) -> dict[int, float]:
    """Runs `svae_jax.main`; seconds from its start to each log of training, by step."""
    fields = configs.flatten(config.to_dict()) | changed
    command = [sys.executable, "-m", "svae_jax.main", "--config=shapes:lowrank"]
    command += [f"--workdir={directory}/{name}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    begin, times, line = time.perf_counter(), {}, ""
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        for line in process.stderr or ():
            if log := re.match(r"step (\d+)/", line):
                times[int(log[1])] = time.perf_counter() - begin
    if process.returncode:
        raise UserError(f"svae_jax.main failed: {line.strip()}")
    return times
