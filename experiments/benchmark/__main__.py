"""Throughput of training and of generating images, against plain Flax and PyTorch, and its costs.

    python -m experiments.benchmark --config=configs/celeba.py:lowrank --json=benchmark.json

Images are generated ones of the configuration's shape; no data set is needed. Parts, by --parts:

    training    images a second of training steps, beside the same network of plain Flax layers and
                in PyTorch, eager and with torch.compile (if installed: pip install -e '.[bench]')
    generation  the same of generating 10,000 images
    batch_size  training and generation against the batch size
    maps        the same against the number of maps N (a vector has none)
    size        the same against the size d of a map
    start       seconds from the start of a process of svae_jax.main to the end of its first step,
                with a compilation cache that is empty (cold) and filled (warm)
    memory      peak memory of training on an array as large as CelebA's, resident and streamed, and
                the speed of both; writes 2 GB to a temporary directory
    main        the share of a bare training step's throughput that a whole run reaches, with its
                logs, samples and checkpoints; takes 1,000 updates

Before anything is compared it is checked to compute the same: losses, gradients and generated
images, from the same parameters, images and noise. Each rival has a process of its own, with its
own settings, and all run in turn. Shown are the median and the quartiles, "from" and "to"; a ratio
is the median of the rounds' ratios. Measure on a machine that does nothing else. Rivals use one
device: on a machine with several GPUs, set CUDA_VISIBLE_DEVICES=0.
"""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections

from experiments.benchmark import candidates, processes, stopwatch
from experiments.benchmark.candidates import OURS, RIVALS
from experiments.benchmark.stopwatch import Candidate, Record, say
from svae_jax import config as configs
from svae_jax.errors import UserError

GENERATED = 10_000  # images, of which the time is told

_SIZES = (2, 3, 4, 6, 8)


def main(argv: Sequence[str]) -> None:
    """Measure the parts asked for, and print a table of each."""
    parser = stopwatch.Parser(__doc__, default_config="configs/celeba.py:lowrank")
    default = ",".join(name for name in PARTS if name not in ("memory", "main"))
    parser.add_argument(
        "--parts",
        default=default,
        help=f"what to measure, of {','.join(PARTS)} (default: {default})",
    )
    parser.add_argument(
        "--against",
        default=",".join(RIVALS),
        help=f"what to compare with, of {','.join(RIVALS)}; empty for nothing (default: both)",
    )
    options, overrides = parser.parse(argv)
    parts = _choice("--parts", options.parts, PARTS)
    against = _choice("--against", options.against, RIVALS)
    config = stopwatch.load_config(options.config, overrides)
    configs.check(config, num_devices=jax.device_count())
    options.against = candidates.installed(against)
    environment = stopwatch.environment()
    print(f"{options.config}, batch {config.batch_size}, {stopwatch.precision(config)}")
    print(stopwatch.heading(environment))
    results = {"config": config.to_dict(), "environment": environment, "parts": {}}
    if options.against and {"training", "generation"} & set(parts):
        results["differences"] = candidates.check_same(config, options.against)
    for part in parts:
        say(f"{part}:")
        records = PARTS[part](config, options)
        results["parts"][part] = records
        stopwatch.save(options.json, results)  # after each part: a later one may fail
        if records:
            print(f"\n{part}\n\n{stopwatch.table(records)}", flush=True)


def _choice(option: str, text: str, allowed: Sequence[str] | Mapping[str, object]) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    if unknown := [name for name in chosen if name not in allowed]:
        raise UserError(f"{option}: no {', '.join(unknown)}; there are {', '.join(allowed)}")
    return chosen


def training(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """Training, ours and the rivals'."""
    images = candidates.generated_images(candidates.NUM_IMAGES, config)
    ours = candidates.training(candidates.recipe_of(config), images)
    return _compared(ours, config.batch_size, options, candidates.rival_training, config.to_dict())


def generation(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """Generation, ours and the rivals'."""
    count = options.generation_batch
    ours = candidates.generation(candidates.recipe_of(config), count)
    fields = config.to_dict()
    records = _compared(ours, count, options, candidates.rival_generation, fields, count)
    return [record | {"s for 10,000": GENERATED / record["images/s"]} for record in records]


def _compared(
    ours: Candidate,
    images: int,
    options: argparse.Namespace,
    make_rival: Callable[..., Candidate],
    *args: object,
) -> list[Record]:
    """A row for us and for each rival, which have processes of their own."""
    timed = {OURS: ours}
    with contextlib.ExitStack() as stack:
        for title in (title for name in options.against for title in RIVALS[name]):
            rival = stack.enter_context(processes.remote(make_rival, title, *args))
            say(f"  {title}: a first call")
            try:
                rival(1)
            except processes.Failed as error:  # torch.compile wants a C++ compiler, or Triton
                say(f"  {title} fails, and is left out: {error}")
            else:
                timed[title] = rival
        times = stopwatch.in_turn(timed, options.seconds)
    return [
        {"implementation": title}
        | stopwatch.throughput(values, images)
        | {f"{OURS} / it": stopwatch.ratio(values, times[OURS])}
        for title, values in times.items()
    ]


def batch_size(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """Training and generation, each with batches of several sizes."""
    sizes = sorted({max(1, round(config.batch_size * scale)) for scale in (0.1, 0.3, 1, 3, 10)})
    sizes = [size for size in sizes if size % jax.device_count() == 0]
    variants = {size: _changed(config, batch_size=size) for size in sizes}
    return _scaling("batch size", variants, options.seconds, {size: size for size in sizes})


def maps(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """Training and generation for several numbers of maps."""
    if config.latent.name == "vector":
        return []
    scaled = {max(1, round(config.latent.maps * scale)) for scale in (0.25, 0.5, 1, 2, 4)}
    variants = {count: _changed(config, **{"latent.maps": count}) for count in sorted(scaled)}
    return _scaling("N", variants, options.seconds, options.generation_batch)


def size(config: ml_collections.ConfigDict, options: argparse.Namespace) -> list[Record]:
    """Training and generation for several sizes of a map."""
    if config.latent.name == "vector":
        return []
    variants = {
        d: _changed(config, **{"latent.height": d, "latent.width": d})
        for d in _SIZES
        if d >= config.latent.rank
    }
    return _scaling("d", variants, options.seconds, options.generation_batch)


def _changed(config: ml_collections.ConfigDict, **fields: object) -> ml_collections.ConfigDict:
    copy = ml_collections.ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(fields)
    return copy


def _scaling(
    column: str,
    variants: Mapping[int, ml_collections.ConfigDict],
    seconds: float,
    generated: int | Mapping[int, int],
) -> list[Record]:
    """Images a second of every variant; all in turn, training and generation apart."""
    images = candidates.generated_images(candidates.NUM_IMAGES, next(iter(variants.values())))
    recipes = {value: candidates.recipe_of(config) for value, config in variants.items()}
    batches = {v: generated if isinstance(generated, int) else generated[v] for v in variants}
    trained = stopwatch.in_turn(
        {f"{column}={v}": candidates.training(recipe, images) for v, recipe in recipes.items()},
        seconds,
    )
    drawn = stopwatch.in_turn(
        {
            f"{column}={v}": candidates.generation(recipe, batches[v])
            for v, recipe in recipes.items()
        },
        seconds,
    )
    records = []
    for value, recipe in recipes.items():
        name = f"{column}={value}"
        row = stopwatch.throughput(trained[name], recipe.batch_size)
        row["generated/s"] = stopwatch.throughput(drawn[name], batches[value])["images/s"]
        records.append({column: value} | row)
    return records


PARTS: dict[str, Callable[[ml_collections.ConfigDict, argparse.Namespace], list[Record]]] = {
    "training": training,
    "generation": generation,
    "batch_size": batch_size,
    "maps": maps,
    "size": size,
    "start": processes.start,
    "memory": processes.memory,
    "main": processes.whole_run,
}

if __name__ == "__main__":
    stopwatch.run(main)
