"""What a run would cost on a GPU or TPU, by XLA's compilers, on a machine that has neither.

    python -m experiments.compiled --config=celeba:lowrank --target=h200 --target=v5e:2x2

Compiles the train step as the loop runs it, the held-out step and generation for each target, and
prints the memory that they take, the kernels of a step, what these move and compute, and the
largest result of a call outside the loop. Nothing is executed: times are estimates.

A target is a device and, behind a colon, how many: h200, h200:4, v5e, v5e:2x2.
"""

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
from svae_jax import config as configs
from svae_jax import files, sizes
from svae_jax.errors import UserError

# Images of the data sets' default training split.
_NUM_IMAGES = {"celeb_a": 162_770, "cifar10": 50_000, "shapes": 20_000}

_LAUNCH = 2e-6  # seconds that a small kernel takes a GPU at least, in a CUDA graph


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
            files.write_json(values.json, {"targets": results})


def _examine(target: str, values: flags.FlagValues) -> dict[str, Any]:
    """Compiles for one target, prints what is found, and returns it for the JSON."""
    config, (device, count) = values.config, targets.find(target)
    configs.check(config, num_devices=count)
    num_images = values.images or _NUM_IMAGES.get(config.dataset.name)
    if num_images is None:
        raise UserError(f"--images: how many has dataset.name={config.dataset.name!r}?")
    data_bytes = num_images * math.prod(sizes.image_shape(config))
    resident = data_bytes <= config.dataset.resident_share * device.memory
    print(f"\n{target}: {count} x {device.name}, {_amount(device.memory)}B each")
    place = "on each device" if resident else "streamed"
    print(f"  {num_images:,} images, {_amount(data_bytes)}B, {place}")
    found = {}
    for name, compiled in compiling.compile_all(
        config,
        targets.devices(target),
        num_images=num_images,
        resident=resident,
        generation_batch=values.generation_batch,
    ):
        images = values.generation_batch if name == "generate" else config.batch_size
        found[name] = _summary(compiled, device, config.model.dtype, images)
        print(f"  {name}, on each device")
        for label, text in _lines(found[name], device):
            print(f"    {label:<12}{text}")
    return found


def _summary(
    compiled: compiling.Compiled, device: targets.Device, dtype: str, images: int
) -> dict[str, Any]:
    """The figures of a program, as it stands in the JSON."""
    program, memory, flops = compiled.program, compiled.memory, compiled.flops
    number, cycles = sum(program.kernels.values()), program.estimated_cycles
    floor = max(program.bytes_moved / device.bandwidth, flops / device.flops[dtype])
    seconds = (cycles or 0) / (device.clock * 1e9) if device.is_tpu else floor + number * _LAUNCH
    return {
        "kernels": number,
        "kernels_by_kind": program.kernels,
        "bytes_moved": program.bytes_moved,
        "flops": flops,
        "collectives": program.collectives,
        "estimated_cycles": cycles,
        "floor_seconds": floor,
        "estimated_seconds": seconds,
        "estimated_images_per_second": images / max(seconds, floor),
        "memory": memory,
        "fits": sum(memory.values()) <= device.memory,
        "largest_outside_loop": program.outside[0].bytes_made if program.outside else 0,
    }


def _lines(found: dict[str, Any], device: targets.Device) -> list[tuple[str, str]]:
    """What is printed of a program: labels and texts."""
    memory = ", ".join(f"{kind} {_amount(size)}B" for kind, size in found["memory"].items())
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    kinds, exchanges = (
        ", ".join(f"{number} {kind}" for kind, number in found[field].items())
        for field in ("kernels_by_kind", "collectives")
    )
    lines = [
        ("memory", f"{memory}: {verdict} in {_amount(device.memory)}B"),
        ("kernels", f"{found['kernels']}: {kinds}"),
        ("moved", f"{_amount(found['bytes_moved'])}B, {_amount(found['flops'])}FLOP"),
        *([("exchanges", exchanges)] if exchanges else []),
    ]
    if found["largest_outside_loop"]:
        size = _amount(found["largest_outside_loop"])
        lines.append(("outside", f"{size}B is the largest result of a call outside the loop"))
    if found["estimated_cycles"] is not None:
        milliseconds = f"{found['estimated_seconds'] * 1e3:.3f} ms at {device.clock} GHz"
        lines.append(("cycles", f"{found['estimated_cycles']:,}, by the compiler: {milliseconds}"))
    rate = f"ESTIMATE {found['estimated_images_per_second']:,.0f} images/s"
    return [*lines, ("time", f"at least {found['floor_seconds'] * 1e3:.3f} ms; {rate}")]


def _amount(value: float) -> str:
    for unit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.0f} "


def _define(values: flags.FlagValues) -> None:
    meaning = f"device to compile for, of {', '.join(targets.DEVICES)}"
    flags.DEFINE_multi_string("target", None, meaning, values)
    flags.mark_flag_as_required("target", values)
    meaning = "size of the training split (default: the data set's)"
    flags.DEFINE_integer("images", None, meaning, flag_values=values)
    flags.DEFINE_integer("generation_batch", 1000, "images generated at a time", flag_values=values)
    options.define_path("json", "file to write the results to, as JSON", values, required=False)


if __name__ == "__main__":
    options.run_command(main)
