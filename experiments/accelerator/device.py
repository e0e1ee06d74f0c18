"""What the device is, whether it computes the same as a CPU, and where its time goes."""

import collections
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator import reference, speed
from experiments.accelerator.sizes import Context, Row, configuration
from experiments.benchmark import processes, stopwatch
from experiments.benchmark.stopwatch import Contender, in_turn
from svae_jax import latents

_SHOWN = 15  # kernels of a profile
_MOST = 15 * 2**20  # bytes of a trace that is kept


def device(context: Context) -> Iterator[Row]:
    """Its name, the libraries, and how fast it copies and multiplies matrices."""
    sizes = context.sizes
    for name, value in stopwatch.environment().items():
        yield {"measured": name, "value": str(value)}
    one = jax.devices()[0]
    yield {"measured": "runtime", "value": " ".join(one.client.platform_version.split())}
    limit = (one.memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        yield {"measured": "memory, GB", "value": f"{limit / 1e9:.1f}"}
    side = sizes.matrix
    matrix = jax.random.normal(jax.random.key(0), (side, side))
    contenders = {
        "copy": _repeated(lambda x: x + 1, jnp.tile(matrix, (4, 1))),
        "float32": _repeated(lambda x: x @ x, matrix),
        "bfloat16": _repeated(lambda x: x @ x, matrix.astype(jnp.bfloat16)),
    }
    times = {name: np.median(taken) for name, taken in in_turn(contenders, sizes.seconds).items()}
    yield {
        "measured": "copy, TB/s read and written",
        "value": f"{32 * side**2 / times['copy'] / 1e12:.3f}",
    }
    for dtype in ("float32", "bfloat16"):
        rate = 2 * side**3 / times[dtype] / 1e12
        yield {"measured": f"matrix product in {dtype}, TFLOP/s", "value": f"{rate:.2f}"}


def _repeated(function: Callable[[jax.Array], jax.Array], array: jax.Array) -> Contender:
    compiled = jax.jit(function)

    def run(units: int) -> None:
        for _ in range(units):
            result = compiled(array)
        result.block_until_ready()

    return run


def posteriors(context: Context) -> Iterator[Row]:
    """20 training steps of each posterior beside a CPU's, and its kernels beside the compiler's.

    A kernel count is of the program as compiled for this device; `estimate` is what
    `experiments.compiled` says of it.
    """
    stored = reference.load(context.sizes)
    for name in latents.names():
        found = reference.measure(context.sizes, name, context.sizes.steps)
        expected = stored[name]
        errors = {key: _error(value, expected[key]) for key, value in found.numbers.items()}
        worst = max(errors, key=lambda key: errors[key])
        ok = all(errors[key] <= reference.TOLERANCES[key] for key in errors)
        yield {
            "model": name,
            "loss, step 1": found.numbers["loss, step 1"],
            "loss, steps 2 to 20": found.numbers["loss, steps 2 to 20"],
            "on a CPU": expected["loss, steps 2 to 20"],
            "largest difference": f"{errors[worst]:.1e} ({worst})",
            "as on a CPU": "yes" if ok else "NO",
            "kernels": found.kernels,
            "estimated": _estimate(expected, "kernels"),
            "step, ms": 1e3 * found.seconds,
            "estimate, ms": _estimate(expected, "milliseconds"),
            "temporaries, MB": found.temporaries / 1e6,
            "compilation, s": found.compilation,
        }


def _error(value: float, expected: float) -> float:
    """The relative difference; infinite for what is not finite."""
    return float(np.nan_to_num(abs(value / expected - 1), nan=np.inf))


def _estimate(stored: Row, field: str) -> float | str:
    """What the compiler said of this kind of device, if it was asked."""
    return stored.get("devices", {}).get(jax.devices()[0].device_kind, {}).get(field, "")


def profile(context: Context) -> Iterator[Row]:
    """The kernels of CelebA `lowrank`'s training steps; the trace is kept as profile.json.gz."""
    sizes = context.sizes
    run = speed.training(configuration(sizes, "CelebA", "lowrank").to_json(), sizes.num_images)
    run(sizes.steps)
    folder = context.scratch / "profile"
    with jax.profiler.trace(str(folder), create_perfetto_trace=False):
        run(sizes.steps)
    (path,) = folder.rglob("*.xplane.pb")
    totals, counts, busy, span = _events(path)
    yield {
        "steps": sizes.steps,
        "kernels a step": sum(counts.values()) / sizes.steps,
        "busy, ms a step": busy / 1e6 / sizes.steps,
        "from first to last, ms a step": span / 1e6 / sizes.steps,
    }
    for name, nanoseconds in totals.most_common(_SHOWN):
        yield {
            "kernel": name[:60],
            "share": nanoseconds / busy,
            "µs a step": nanoseconds / 1e3 / sizes.steps,
            "times a step": counts[name] / sizes.steps,
        }
    for trace in folder.rglob("*.trace.json.gz"):
        if trace.stat().st_size <= _MOST:
            shutil.copy(trace, context.out / "profile.json.gz")


def _events(path: Path) -> tuple[collections.Counter, collections.Counter, float, float]:
    """Nanoseconds and number of each kernel, of all together, and from the first to the last."""
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in on_device or planes for line in plane.lines]
    # A TPU has lines for steps and modules besides; a GPU a line for each stream.
    operations = [line for line in lines if line.name == "XLA Ops"]
    operations = operations or [line for line in lines if line.name.startswith("Stream")] or lines
    totals, counts = collections.Counter[str](), collections.Counter[str]()
    begin, end = np.inf, 0.0
    for line in operations:
        for event in line.events:
            totals[event.name] += event.duration_ns
            counts[event.name] += 1
            begin = min(begin, event.start_ns)
            end = max(end, event.start_ns + event.duration_ns)
    return totals, counts, float(sum(totals.values())), float(end - begin)


def memory(context: Context) -> Iterator[Row]:
    """Memory and speed of training on an array as large as CelebA's, resident and streamed."""
    config = configuration(context.sizes, "CelebA", "lowrank")
    yield from processes.memory(config, 3 * context.sizes.seconds, context.sizes.array)
