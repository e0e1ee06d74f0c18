"""Speed of training and generation against plain Flax and PyTorch, and how cost grows.

    python -m experiments.benchmark --config=celeba:lowrank --json=benchmark.json

No data set is needed: images are noise in the configuration's shape. The parts, by --parts:

    training    images a second of training, beside the same network of plain Flax layers and in
                PyTorch, eager and with torch.compile (if installed: pip install -e '.[bench]')
    generation  the same for generating images
    batch_size  training and generation against the batch size,
    maps        against the number N of maps,
    size        and against the size d of a map
    memory      peak memory and speed of training on an array as large as CelebA's, resident and
                streamed; writes 2 GB to a temporary directory
    paper       Table 1 of the paper: the time of an epoch (1,600 training steps, as the authors
                count it) and of 10,000 images, for its four models, beside its own figures
    main        a run of svae_jax.main on the embedded data set: seconds to the first step, and
                throughput with logs, samples and checkpoints; takes 1,000 training steps

Before baselines are timed, they are checked to compute the same losses, gradients and images from
the same parameters, images and noise. Each baseline has a process of its own, and all run in turn.
Tables show medians and quartiles; a ratio is the median of the rounds' ratios. On a GPU all round
the factors of float32 products to TF32. Measure on an idle machine: on a busy CPU PyTorch loses
most, since its threads wait for each other. Baselines use one device: with several GPUs, set
CUDA_VISIBLE_DEVICES=0.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from experiments import options
from experiments.benchmark import baselines, processes, stopwatch, workloads
from experiments.benchmark.baselines import OURS
from experiments.benchmark.stopwatch import Record, Seconds, in_turn, ratio, throughput
from svae_jax import config as configs
from svae_jax import files
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.terminal import say

_COMPARED = ("training", "generation")
_SCALED = {"batch_size": "batch_size", "maps": "latent.maps", "size": "latent.height latent.width"}
_PARTS = (*_COMPARED, *_SCALED, "memory", "paper", "main")

# Seconds of an epoch and of 10,000 images on a Tesla K40C (Wang, Yuan, Ji 2017, Table 1).
_PAPER = {
    "vector": (167.0, 1.389),
    "naive": (178.9, 1.368),
    "mvn": (177.4, 1.377),
    "lowrank": (173.0, 1.369),
}


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_float("seconds", 20.0, "time of each measurement", 1e-3, flag_values=values)
    options.define_path("json", "file for the results", values, required=False)
    flags.register_validator(
        "json",
        lambda path: path is None or path.absolute().parent.is_dir(),
        "there is no such directory",
        values,
    )
    lists = (("parts", _COMPARED, _PARTS), ("against", baselines.NAMES, baselines.NAMES))
    for name, default, words in lists:
        allowed = f"among {', '.join(words)}"
        options.define_list(name, [*default], allowed, values)
        flags.register_validator(name, {*words}.issuperset, f"must be {allowed}", values)


def main(argv: Sequence[str]) -> None:
    """Measures the parts asked for, and prints a table of each."""
    values = options.parse(argv, __doc__, _define, config="celeba:lowrank")
    # A GPU's memory is shared with PyTorch, and with processes that are measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.keep_freed_memory()  # as `svae_jax.main` does
    config, against = values.config, values.against
    configs.check(config, num_devices=jax.device_count())
    if "pytorch" in against and importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed and is left out; pip install -e '.[bench]' installs it")
        against.remove("pytorch")
    name, found = config.dataset.name, stopwatch.environment()
    print(name, config.latent.name, f"batch {config.batch_size}", config.model.dtype, sep=", ")
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    results = {"config": config.to_dict(), "environment": found}
    if against and not {*_COMPARED}.isdisjoint(values.parts):
        results["differences"] = baselines.check_same(config, against)
    for part in values.parts:
        say(f"{part}:")
        records = _measure(part, values)
        print(f"\n{part}\n\n{stopwatch.table(records)}", flush=True)
        results[part] = records
        if values.json is not None:  # after each part: a later one may fail
            files.write_json(values.json, results)


def _measure(part: str, values: flags.FlagValues) -> list[Record]:
    config, seconds = values.config, values.seconds
    if part in _COMPARED:
        return comparison(part, config, values.against, seconds)
    if part in _SCALED:
        return scaling(part, config, seconds)
    if part == "paper":
        file, fields = options.config_path(values).partition(":")[0], options.overrides(values)
        return paper({name: options.load(f"{file}:{name}", fields) for name in _PAPER}, seconds)
    return (processes.memory if part == "memory" else processes.whole_run)(config, seconds)


def comparison(
    part: str, config: ml_collections.ConfigDict, against: Sequence[str], seconds: float
) -> list[Record]:
    """Training or generation: a row for this project, and one for each baseline."""
    contenders = {OURS: baselines.contender(OURS, part, config.to_json())}
    with contextlib.ExitStack() as stack:
        for name in (name for word in against for name in baselines.NAMES[word]):
            process = processes.OwnProcess(baselines.contender, name, part, config.to_json())
            run = stack.enter_context(process)
            say(f"  {name}: a first call")
            try:
                run(1)
                contenders[name] = run
            except (UserError, BrokenProcessPool) as error:  # torch.compile needs a compiler
                say(f"  {name} fails and is left out: {error}")
        times = in_turn(contenders, seconds)
    images = config.batch_size if part == "training" else workloads.GENERATED
    return [
        {"implementation": name, f"speed of {OURS} / this": ratio(taken, times[OURS])}
        | throughput(taken, images)
        for name, taken in times.items()
    ]


def scaling(part: str, config: ml_collections.ConfigDict, seconds: float) -> list[Record]:
    """Training and generation for several batch sizes, numbers of maps, or sizes of a map."""
    devices = jax.device_count()
    values = {
        "batch_size": [
            math.ceil(x * (config.batch_size // devices)) * devices for x in (0.1, 0.3, 1, 3, 10)
        ],
        "maps": [math.ceil(x * config.latent.maps) for x in (0.25, 0.5, 1, 2, 4)],
        "size": [d for d in (2, 3, 4, 6, 8) if d >= config.latent.rank],
    }[part]
    variants = {}
    for value in values:
        variants[f"{part}={value}"] = changed = configs.from_dict(config.to_dict())
        changed.update_from_flattened_dict(dict.fromkeys(_SCALED[part].split(), value))
    records = {name: {"variant": name} for name in variants}
    for what in _COMPARED:
        fixed = what == "generation" and part != "batch_size"
        count = {
            name: workloads.GENERATED if fixed else variant.batch_size
            for name, variant in variants.items()
        }
        for name, taken in _times(what, variants, count, seconds).items():
            records[name][f"{what}, images/s"] = throughput(taken, count[name])["images/s"]
    return list(records.values())


def paper(models: Mapping[str, ml_collections.ConfigDict], seconds: float) -> list[Record]:
    """Seconds of an epoch and of 10,000 images, and the ratios to `vector`; here, and there."""
    for model in models.values():
        configs.check(model, num_devices=jax.device_count())
    records: dict[str, Record] = {name: {"model": name} for name in models}
    work = (("epoch", 1600), ("10,000 images", 10_000 / workloads.GENERATED))
    for column, (what, (title, units)) in enumerate(zip(_COMPARED, work, strict=True)):
        times = _times(what, models, dict.fromkeys(models, workloads.GENERATED), seconds)
        for name, taken in times.items():
            theirs = _PAPER[name][column]
            records[name] |= {
                f"{title}, s": float(np.median(taken)) * units,
                f"{title} / vector": ratio(taken, times["vector"]),
                f"paper, {title}, s": theirs,
                f"paper, {title} / vector": theirs / _PAPER["vector"][column],
            }
    return list(records.values())


def _times(
    what: str, variants: Mapping[str, Any], generated: Mapping[str, int], seconds: float
) -> dict[str, Seconds]:
    """Our training or generation, of so many images, with several configurations in turn."""
    contenders = {
        name: baselines.contender(OURS, what, config.to_json(), generated[name])
        for name, config in variants.items()
    }
    return in_turn(contenders, seconds)


if __name__ == "__main__":
    options.run_command(main)
