"""What a run would cost on a GPU or TPU, by XLA's compilers, on a machine that has neither.

    python -m experiments.compiled --config=celeba:lowrank --target=h200 --target=v5e:2x2

Compiles the train step as the loop runs it, the held-out step and generation for each target, and
prints the memory that they take, the kernels of a step, what these move and compute, and what a
call does outside the loop. Nothing is executed: times are estimates.

A target is a device and, behind a colon, how many: h200, h200:4, v5e, v5e:2x2.
"""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

if __name__ == "__main__":
    # Before JAX is imported, which would look for the devices of the compilers and warn.
    os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags

from experiments import options
from experiments.compiled import compiling, targets
from experiments.compiled.compiling import Compiled
from svae_jax import config as configs
from svae_jax import sizes
from svae_jax.errors import UserError

# Images of the data sets' default training split.
_NUM_IMAGES = {"celeb_a": 162_770, "cifar10": 50_000, "shapes": 20_000}

_LAUNCH = 2e-6  # seconds that a small kernel takes a GPU at least, in a CUDA graph

_SHOWN = 10**6  # bytes of a result outside the loop that is worth a line


def main(argv: Sequence[str]) -> None:
    """Compiles for each target, prints, and writes the JSON.

    Raises:
        UserError: for a mistake in the options, or a compiler that is not installed.
    """
    values = options.parse(argv, __doc__, _define, config="celeba:lowrank")
    for target in values.target:
        targets.find(target)
    results = {}
    for target in values.target:
        results[target] = _examine(target, values)
        if values.json is not None:
            text = json.dumps({"targets": results}, indent=2) + "\n"
            values.json.write_text(text)


def _examine(target: str, values: flags.FlagValues) -> dict[str, Any]:
    """Compiles for one target, prints what is found, and returns it for the JSON."""
    config, generation_batch = values.config, values.generation_batch
    device, layout = targets.find(target)
    count = targets.num_devices(layout)
    configs.check(config, num_devices=count)
    num_images = values.images or _NUM_IMAGES.get(config.dataset.name)
    if num_images is None:
        raise UserError(f"--images: how many has dataset.name={config.dataset.name!r}?")
    data_bytes = num_images * math.prod(sizes.image_shape(config))
    resident = data_bytes <= config.dataset.resident_share * device.memory
    print(f"\n{target}: {count} x {device.name}, {_amount(device.memory)}B each")
    place = "on each device" if resident else "streamed"
    print(f"  {num_images:,} images, {_amount(data_bytes)}B, {place}")
    found: dict[str, Any] = {}
    for name, compiled in compiling.compile_all(
        config,
        targets.devices(target),
        num_images=num_images,
        resident=resident,
        generation_batch=generation_batch,
    ):
        images = generation_batch if name == "generate" else config.batch_size
        found[name] = _summary(compiled, device, config.model.dtype, images, resident)
        _print(name, found[name], device)
    return {**found, "memory": found["train_step"]["memory"], "largest_outside_loop":
            found["train_step"]["largest_outside_loop"]}  # fmt: skip


def _summary(
    compiled: Compiled, device: targets.Device, dtype: str, images: int, resident: bool
) -> dict[str, Any]:
    """The figures of a program, as it stands in the JSON."""
    cost = compiled.program.cost()
    outside = compiled.program.outside_loop(at_least=0)
    number = sum(cost.kernels.values())
    floor = max(cost.bytes_moved / device.bandwidth, cost.flops / device.flops[dtype])
    if device.is_tpu:
        seconds = (cost.estimated_cycles or 0) / (device.clock * 1e9)
    else:
        seconds = floor + number * _LAUNCH
    return {
        "kernels": number,
        "kernels_by_kind": cost.kernels,
        "bytes_moved": cost.bytes_moved,
        "flops": cost.flops,
        "all_reduces": cost.collectives.get("all-reduce", 0),
        "collectives": cost.collectives,
        "estimated_cycles": cost.estimated_cycles,
        "floor_seconds": floor,
        "estimated_seconds": seconds,
        "estimated_images_per_second": images / max(seconds, floor),
        "memory": compiled.memory,
        "fits": sum(compiled.memory.values()) <= device.memory,
        "outside_loop": [
            {"name": name, "shape": shape, "bytes": size}
            for name, shape, size in outside
            if size >= _SHOWN
        ],
        "largest_outside_loop": outside[0][2] if outside else 0,
    }


def _print(name: str, found: dict[str, Any], device: targets.Device) -> None:
    memory = ", ".join(f"{kind} {_amount(size)}B" for kind, size in found["memory"].items())
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["kernels_by_kind"].items())
    print(f"  {name}, on each device")
    print(f"    memory      {memory}: {verdict} in {_amount(device.memory)}B")
    print(f"    kernels     {found['kernels']}: {kinds}")
    print(f"    moved       {_amount(found['bytes_moved'])}B, {_amount(found['flops'])}FLOP")
    if found["collectives"]:
        exchanges = ", ".join(f"{n} {kind}" for kind, n in found["collectives"].items())
        print(f"    exchanges   {exchanges}")
    for operation in found["outside_loop"]:
        print(
            f"    outside     {_amount(operation['bytes'])}B {operation['shape']} "
            f"({operation['name']}), once a call"
        )
    if found["estimated_cycles"] is not None:
        print(
            f"    cycles      {found['estimated_cycles']:,}, by the compiler: "
            f"{found['estimated_seconds'] * 1e3:.3f} ms at {device.clock} GHz"
        )
    print(
        f"    time        at least {found['floor_seconds'] * 1e3:.3f} ms; ESTIMATE "
        f"{found['estimated_images_per_second']:,.0f} images/s"
    )


def _amount(value: float) -> str:
    for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.0f} "


def _define(values: flags.FlagValues) -> None:
    meaning = f"device to compile for, of {', '.join(targets.DEVICES)}"
    flags.DEFINE_multi_string("target", None, meaning, values)
    flags.mark_flag_as_required("target", values)
    flags.DEFINE_integer(
        "images", None, "size of the training split (default: the data set's)", flag_values=values
    )
    flags.DEFINE_integer("generation_batch", 1000, "images generated at a time", flag_values=values)
    options.define_path("json", "file to write the results to, as JSON", values, required=False)


if __name__ == "__main__":
    options.run_command(main)
