"""Table 1 of the paper: the time of training and generating, for its four models.

    python -m experiments.timing --json=timing.json
    python -m experiments.timing --data_dir=$TFDS_DATA_DIR

Timed are one epoch of CelebA as the authors count it, 1,600 updates of 100 images, and generating
10,000 images. Beside them stand the paper's figures (Wang, Yuan, Ji 2017; one Tesla K40C), and the
ratios to the original VAE, `vector`. The four models run in turn, so that all meet the same state
of the machine. Without --data_dir the images are generated ones of the same shape: the time does
not depend on what they show. An epoch is scaled from as many updates as fit into --seconds.
"""

import argparse
from collections.abc import Mapping, Sequence

import jax
import ml_collections
import numpy as np

from experiments.benchmark import candidates, stopwatch
from experiments.benchmark.candidates import Images
from experiments.benchmark.stopwatch import Record, Timed, say
from svae_jax import config as configs
from svae_jax.errors import UserError

# Seconds on a Tesla K40C: an epoch, and 10,000 images.
PAPER = {
    "vector": {"epoch": 167.0, "generation": 1.389},
    "naive": {"epoch": 178.9, "generation": 1.368},
    "mvn": {"epoch": 177.4, "generation": 1.377},
    "lowrank": {"epoch": 173.0, "generation": 1.369},
}
UPDATES = 1600
GENERATED = 10_000

_ORIGINAL = "vector"


def main(argv: Sequence[str]) -> None:
    """Time the four models, and print the table."""
    parser = stopwatch.Parser(__doc__, default_config="configs/celeba.py")
    parser.add_argument(
        "--data_dir",
        help="where TFDS keeps CelebA, or is to prepare it; without, images are generated",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=candidates.NUM_IMAGES,
        help="how many different images to train on (default: 10,000)",
    )
    options, overrides = parser.parse(argv)
    if options.images < 1:
        parser.error(f"--images={options.images} must be at least 1")
    path = options.config.partition(":")[0]
    config_of = {name: stopwatch.load_config(f"{path}:{name}", overrides) for name in PAPER}
    for config in config_of.values():
        configs.check(config, num_devices=jax.device_count())
    config = config_of[_ORIGINAL]
    environment = stopwatch.environment()
    images, source = load_images(config, options)
    records, updates = measure(config_of, images, options.seconds, options.generation_batch)
    print(f"{path}, batch {config.batch_size}, {stopwatch.precision(config)}; {source}")
    print(stopwatch.heading(environment))
    part = "" if updates >= UPDATES else f", scaled from a part of an epoch: {updates:,} updates"
    print(f"epoch s: {UPDATES:,} updates of {config.batch_size}{part}")
    print(f"generation s: {GENERATED:,} images, {options.generation_batch:,} at a time")
    print(f"\n{stopwatch.table(records)}")
    results = {
        "images": source,
        "updates timed": updates,
        "config": {name: config.to_dict() for name, config in config_of.items()},
        "environment": environment,
        "models": records,
    }
    stopwatch.save(options.json, results)


def load_images(
    config: ml_collections.ConfigDict, options: argparse.Namespace
) -> tuple[Images, str]:
    """The images to train on, and what they are."""
    generated = f"{options.images:,} generated images"
    if options.data_dir is None:
        return candidates.generated_images(options.images, config), generated
    from svae_jax import data  # and with it TFDS, without which generated images do

    dataset = config.dataset
    try:
        images = data.load(
            dataset.name,
            dataset.split,
            image_size=dataset.image_size,
            channels=dataset.channels,
            data_dir=options.data_dir,
            cache_dir=dataset.cache_dir,
        )[: options.images]
    except UserError as error:
        say(f"{dataset.name} cannot be had: {error}")
        generated += f", since {dataset.name} cannot be had"
        return candidates.generated_images(options.images, config), generated
    return images, f"{len(images):,} images of {dataset.name}"


def measure(
    config_of: Mapping[str, ml_collections.ConfigDict],
    images: Images,
    seconds: float,
    generation_batch: int,
) -> tuple[list[Record], int]:
    """A row of the table for each model, and the number of updates each was timed for."""
    recipes = {
        name: candidates.recipe_of(config, len(images)) for name, config in config_of.items()
    }
    say("training:")
    run_of = {name: candidates.training(recipe, images) for name, recipe in recipes.items()}
    trained = stopwatch.in_turn(run_of, seconds)
    say("generation:")
    run_of = {name: candidates.generation(r, generation_batch) for name, r in recipes.items()}
    drawn = stopwatch.in_turn(run_of, seconds)
    records = [
        {"model": name}
        | _columns("epoch", name, trained, UPDATES)
        | _columns("generation", name, drawn, GENERATED / generation_batch)
        for name in config_of
    ]
    return records, min(timed.units for timed in trained.values())


def _columns(what: str, name: str, timed: Mapping[str, Timed], units: float) -> Record:
    """Seconds of so many units of work, and the ratio to the original VAE: here, in the paper."""
    on_k40c = {model: figures[what] for model, figures in PAPER.items()}
    return {
        f"{what} s": float(np.median(timed[name].seconds)) * units,
        f"{what} / {_ORIGINAL}": stopwatch.ratio(timed[name], timed[_ORIGINAL]),
        f"K40C {what} s": on_k40c[name],
        f"K40C {what} / {_ORIGINAL}": on_k40c[name] / on_k40c[_ORIGINAL],
    }


if __name__ == "__main__":
    stopwatch.run(main)
