"""Speed of training and generation, beside PyTorch's, and of processes that share the device."""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from experiments.accelerator.sizes import DATA, Context, Row, Sizes, configuration
from experiments.accelerator.worker import halving, is_about_memory
from experiments.benchmark import baselines, workloads
from experiments.benchmark.baselines import COMPILED, OURS
from experiments.benchmark.processes import OwnProcess
from experiments.benchmark.stopwatch import Contender, Seconds, in_turn, ratio, throughput
from svae_jax import config as configs
from svae_jax.errors import UserError
from svae_jax.terminal import say

EPOCH, GENERATED = 160_000, 10_000  # images: the paper's epoch of CelebA, and what it generates

_RATIO = f"speed of {OURS} / this"

# Text, column, least and most, and the rows that it is of.
_GOALS: tuple[tuple[str, str, float, float, Row], ...] = (
    ("training, speed / compiled PyTorch's: at least 2", _RATIO, 2, math.inf,
     {"compared": "training", "implementation": COMPILED}),
    ("generation, speed / compiled PyTorch's: at least 2", _RATIO, 2, math.inf,
     {"compared": "generation", "implementation": COMPILED}),
    ("160,000 images at the usual batch: at most 4 s", "epoch, s", 0, 4, {"at": "usual batch"}),
    ("160,000 images at the fastest batch: at most 1 s", "epoch, s", 0, 1, {"at": "fastest batch"}),
    ("10,000 images generated: at most 20 ms", "10,000 images, ms", 0, 20, {}),
    ("training, time of lowrank / vector: at most 1.02", "training time / vector", 0, 1.02,
     {"model": "lowrank"}),
    ("generation, time of lowrank / vector: at most 1.00", "generation time / vector", 0, 1,
     {"model": "lowrank"}),
)  # fmt: skip

_MODELS = ("vector", "lowrank")
_DTYPES = ("float32", "bfloat16")  # float32 with TF32 products on a GPU, here and in PyTorch


def training(config_json: str, num_images: int) -> Contender:
    """Training steps on so many random images."""
    config = configs.from_dict(json.loads(config_json))
    recipe = workloads.recipe(config, num_images)
    return workloads.training(recipe, workloads.noise(config, num_images))


def speed(context: Context) -> Iterator[Row]:
    """`vector` and `lowrank` in turn: an epoch at the usual and the fastest batch; generation."""
    sizes = context.sizes
    for dtype in _DTYPES:
        for data in DATA:
            usual = functools.partial(_epochs, sizes, data, dtype, "usual batch")
            yield from halving(usual, sizes.batch)
            yield from halving(functools.partial(_generation, sizes, data, dtype), sizes.generated)
        for data in DATA:
            tried = list(_batches(sizes, data, dtype))
            yield from tried
            if (best := fastest(tried, data, dtype)) is not None:
                yield from _epochs(sizes, data, dtype, "fastest batch", best)


def _epochs(sizes: Sizes, data: str, dtype: str, which: str, batch: int) -> Iterator[Row]:
    def make(model: str) -> Contender:
        config = configuration(sizes, data, model, batch=batch, dtype=dtype)
        return training(config.to_json(), sizes.num_images)

    times = in_turn({model: make(model) for model in _MODELS}, sizes.seconds)
    for model, taken in times.items():
        yield {
            "training": data, "at": which, "model": model, "dtype": dtype, "batch": batch,
            "images/s": throughput(taken, batch)["images/s"],
            "epoch, s": float(np.median(taken)) * EPOCH / batch,
            "training time / vector": ratio(taken, times["vector"]),
        }  # fmt: skip


def _generation(sizes: Sizes, data: str, dtype: str, count: int) -> Iterator[Row]:
    def make(model: str) -> Contender:
        config = configuration(sizes, data, model, dtype=dtype)
        return workloads.generation(workloads.recipe(config), count)

    times = in_turn({model: make(model) for model in _MODELS}, sizes.seconds)
    for model, taken in times.items():
        yield {
            "generation": data, "model": model, "dtype": dtype, "at a time": count,
            "images/s": throughput(taken, count)["images/s"],
            "10,000 images, ms": 1e3 * float(np.median(taken)) * GENERATED / count,
            "generation time / vector": ratio(taken, times["vector"]),
        }  # fmt: skip


def _batches(sizes: Sizes, data: str, dtype: str) -> Iterator[Row]:
    """Training of `lowrank` with larger and larger batches, until one is slower or too large."""

    def measure(batch: int) -> Iterator[Row]:
        config = configuration(sizes, data, "lowrank", batch=batch, dtype=dtype)
        (taken,) = in_turn(
            {"lowrank": training(config.to_json(), sizes.num_images)}, sizes.seconds
        ).values()
        rate = throughput(taken, batch)["images/s"]
        yield {"larger batches": data, "dtype": dtype, "batch": batch, "images/s": rate}

    before = 0.0
    for batch in sizes.batches:
        rows = list(halving(measure, batch))
        yield from rows
        if len(rows) > 1 or rows[-1]["images/s"] < before:
            return
        before = rows[-1]["images/s"]


def fastest(rows: Iterable[Row], data: str, dtype: str) -> int | None:
    """The batch with the most images a second among the larger ones that were tried."""
    rates = {
        row["batch"]: row["images/s"]
        for row in rows
        if row.get("larger batches") == data and row["dtype"] == dtype
    }
    return max(rates, key=lambda batch: rates[batch], default=None)


def pytorch(context: Context) -> Iterator[Row]:
    """The same beside PyTorch, eager and with torch.compile; `lowrank` with float32 comes first."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed")
    sizes = context.sizes
    for model, dtype, size, data in itertools.product(
        reversed(_MODELS), _DTYPES, ("usual", "best"), DATA
    ):
        best = fastest(context.results.get("speed", ()), data, dtype) or sizes.batches[0]
        batch = sizes.batch if size == "usual" else best
        yield from halving(functools.partial(_compare, sizes, data, model, dtype), batch)


def _compare(sizes: Sizes, data: str, model: str, dtype: str, batch: int) -> Iterator[Row]:
    config = configuration(sizes, data, model, batch=batch, dtype=dtype)
    known = {"data": data, "model": model, "dtype": dtype, "batch": batch}
    images = {"training": batch}
    if batch == sizes.batch:  # generation does not depend on it
        images["generation"] = sizes.generated
    names = [name for name in baselines.NAMES["pytorch"] if sizes.compiled or name != COMPILED]
    with contextlib.ExitStack() as stack:
        runs: dict[tuple[str, str], Contender] = {}
        for part, name in itertools.product(images, names):
            arguments = (name, part, config.to_json(), images[part])
            runs[part, name] = stack.enter_context(OwnProcess(baselines.contender, *arguments))
        failures = _first_calls(runs)
        for (part, name), failure in failures.items():
            yield {"compared": part, **known, "implementation": name, "failed": failure}
        ours = {
            "training": lambda: training(config.to_json(), sizes.num_images),
            "generation": lambda: workloads.generation(workloads.recipe(config), sizes.generated),
        }
        for part, count in images.items():
            theirs = {
                n: run for (p, n), run in runs.items() if p == part and (p, n) not in failures
            }
            times = in_turn({OURS: ours[part]()} | theirs, sizes.seconds)
            yield from (_compared(part, known, name, times, count) for name in times)


def _first_calls(runs: Mapping[tuple[str, str], Contender]) -> dict[tuple[str, str], str]:
    """Makes all first calls at once, since PyTorch compiles for long; what those that fail say.

    Raises:
        UserError: one ran out of memory.
    """

    def first(run: Contender) -> str:
        try:
            run(1)
        except (UserError, BrokenProcessPool) as error:
            if is_about_memory(str(error)):
                raise
            return str(error)
        return ""

    say(f"  first calls of {', '.join(' '.join(key) for key in runs)}")
    with futures.ThreadPoolExecutor(len(runs)) as pool:
        errors = dict(zip(runs, pool.map(first, runs.values()), strict=True))
    return {key: error for key, error in errors.items() if error}


def _compared(part: str, known: Row, name: str, times: Mapping[str, Seconds], images: int) -> Row:
    return {
        "compared": part, **known, "implementation": name,
        "images/s": throughput(times[name], images)["images/s"],
        _RATIO: ratio(times[name], times[OURS]),
    }  # fmt: skip


def sharing(context: Context) -> Iterator[Row]:
    """CIFAR-10 `lowrank` trained in several processes at once, as trials of a sweep are."""
    sizes = context.sizes
    config = configuration(sizes, "CIFAR-10", "lowrank").to_json()
    with contextlib.ExitStack() as stack, futures.ThreadPoolExecutor(max(sizes.trials)) as pool:
        runs = [
            stack.enter_context(OwnProcess(training, config, sizes.num_images))
            for _ in range(max(sizes.trials))
        ]
        list(pool.map(lambda run: run(1), runs))
        begin = time.perf_counter()
        runs[0](sizes.steps)
        steps = max(1, round(sizes.steps * sizes.seconds / (time.perf_counter() - begin)))
        alone = None
        for count in sizes.trials:
            begin = time.perf_counter()
            list(pool.map(lambda run: run(steps), runs[:count]))
            rate = count * steps * sizes.batch / (time.perf_counter() - begin)
            alone = alone or rate
            yield {"trials at once": count, "images/s, together": rate, "/ one": rate / alone}


def goals(results: Mapping[str, Iterable[Row]]) -> list[Row]:
    """What this project wants of an accelerator, beside the least and most that was measured."""
    rows = [row for part in ("speed", "pytorch") for row in results.get(part, ())]
    table = []
    for text, column, low, high, wanted in _GOALS:
        found = [r[column] for r in rows if column in r and wanted.items() <= r.items()]
        met = sum(low <= value <= high for value in found)
        span = f"{min(found):.3g} to {max(found):.3g}" if found else "not measured"
        table.append({"goal": text, "measured": span, "met in": f"{met} of {len(found)} cases"})
    return table
