"""Numbers of 20 training steps on a CPU, and what XLA's compilers say of GPUs: `reference.json`.

    JAX_PLATFORMS=cpu python -m experiments.accelerator.reference

writes it anew, which takes minutes; XLA's compiler for GPUs must be installed
(pip install -e '.[compiled]').
"""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import options
from experiments.accelerator.sizes import FULL, TINY, Sizes, configuration
from experiments.benchmark import workloads
from experiments.compiled import compiling, targets
from svae_jax import latents
from svae_jax.data import cache
from svae_jax.devices import runtime, sharding
from svae_jax.training import feed, step
from svae_jax.training.metrics import TrainMetrics

_PATH = Path(__file__).with_suffix(".json")
_DATA = "CIFAR-10"
_TARGETS = ("h100", "h200")
_STEPS = 20

# Largest relative differences to the CPU, of step 1 and of steps 2 to 20. A GPU rounds the factors
# of float32 products to 11 significant bits (TF32); rounding to bfloat16's 8 on a CPU changes the
# loss by 1e-5 and the KL by 2e-4.
_TOLERATED = {"loss": (1e-4, 1e-3), "reconstruction": (1e-4, 1e-3), "kl": (1e-3, 1e-2)}
TOLERANCES = {
    f"{name}, {when}": tolerance
    for name, pair in _TOLERATED.items()
    for when, tolerance in zip(("step 1", "steps 2 to 20"), pair, strict=True)
}


class Found(NamedTuple):
    """What training steps of a posterior gave.

    Attributes:
        numbers: metrics of the first step, and means over steps 2 to 20, in nats an image.
        kernels: of a step, in the program compiled for this device.
        temporaries: bytes of that program.
        seconds: for a step.
        compilation: seconds.
    """

    numbers: dict[str, float]
    kernels: int
    temporaries: int
    seconds: float
    compilation: float


def load(sizes: Sizes) -> dict[str, Any]:
    """The stored numbers of these sizes, by the posteriors' names."""
    return json.loads(_PATH.read_text())["tiny" if sizes.tiny else "full"]


def measure(sizes: Sizes, name: str, timed: int, dtype: str = "float32") -> Found:
    """Trains a posterior on CIFAR-10's network for 20 steps, and for as many as are timed."""
    config = configuration(sizes, _DATA, name, dtype=dtype)
    recipe, images = workloads.recipe(config, sizes.num_images), _blocks(sizes.num_images)
    mesh = sharding.make_mesh()
    begin = time.perf_counter()
    compiled = compiling.train_step(recipe, mesh, len(images))
    compilation = time.perf_counter() - begin
    train_steps = feed.make(recipe, images, mesh, 1.0)
    everywhere = sharding.replicated(mesh)
    empty = jax.jit(TrainMetrics.empty, out_shardings=everywhere)
    state = jax.jit(lambda: step.init_state(recipe), out_shardings=everywhere)()
    at, numbers = 0, dict[str, float]()
    for when, stop in (("step 1", 1), (f"steps 2 to {_STEPS}", _STEPS), ("timed", _STEPS + timed)):
        totals, begin = empty(), time.perf_counter()
        while at < stop:
            state, totals, made = train_steps(state, totals, at, stop - at)
            at += made
        found = totals.compute()
        numbers |= {f"{key}, {when}": float(found[key]) for key in _TOLERATED}
    return Found(
        {key: value for key, value in numbers.items() if "timed" not in key},
        sum(compiled.program.kernels.values()),
        compiled.memory["temporaries"],
        (time.perf_counter() - begin) / timed,
        compilation,
    )


def _blocks(count: int) -> workloads.Images:
    """Images of 4×4 blocks of random colours: unlike noise, they can be learned."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return colours.repeat(8, 1).repeat(8, 2)


def _estimates(name: str) -> dict[str, dict[str, float]]:
    """Kernels and time of a step as `experiments.compiled` says, by the names of devices."""
    from experiments.compiled import __main__ as compiled

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "found.json"
        compiled.main(
            [
                f"--config=cifar10:{name}",
                *(f"--target={target}" for target in _TARGETS),
                *(f"--images={FULL.num_images}", f"--json={path}"),
            ]
        )
        found = json.loads(path.read_text())["targets"]
    return {
        targets.find(target)[0].name: {
            "kernels": found[target]["train_step"]["kernels"],
            "milliseconds": 1e3 * found[target]["train_step"]["estimated_seconds"],
        }
        for target in _TARGETS
    }


def main(argv: Sequence[str]) -> None:
    """Writes `reference.json`, and prints how far bfloat16 is from float32."""
    options.parse(argv, __doc__)
    runtime.keep_compiled_programs(cache.home() / "compiled")
    stored: dict[str, Any] = {"tiny": {}, "full": {}}
    for scale, sizes in (("tiny", TINY), ("full", FULL)):
        for name in latents.names():
            numbers = measure(sizes, name, timed=1).numbers
            stored[scale][name] = dict(numbers)
            rounded = measure(sizes, name, timed=1, dtype="bfloat16").numbers
            errors = {key: f"{abs(rounded[key] / numbers[key] - 1):.1e}" for key in numbers}
            print(scale, name, numbers, "in bfloat16 off by", errors, flush=True)
            if not sizes.tiny:
                stored[scale][name]["devices"] = _estimates(name)
    _PATH.write_text(json.dumps(stored, indent=2) + "\n")


if __name__ == "__main__":
    options.run_command(main)
