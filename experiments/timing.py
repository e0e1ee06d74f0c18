"""Table 1 of the paper: the time of training and of generation, for its four models.

    python -m experiments.timing --json=timing.json
    python -m experiments.timing --config.dataset.data_dir=$TFDS_DATA_DIR

An epoch is 1,600 updates of 100 images, as the authors count it, scaled from as many updates as fit
into --seconds; generation is that of 10,000 images. Beside them stand the paper's figures (Wang,
Yuan, Ji 2017; one Tesla K40C), and the ratios to the original VAE, `vector`. The four models run in
turn. Without a data_dir the images are noise: the time does not depend on what they show.
"""

from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from experiments.benchmark import terminal, workloads
from experiments.benchmark.stopwatch import Record, Seconds, in_turn, ratio, say
from svae_jax import config as configs

# Seconds on a Tesla K40C: an epoch, and 10,000 images.
PAPER = {
    "vector": (167.0, 1.389),
    "naive": (178.9, 1.368),
    "mvn": (177.4, 1.377),
    "lowrank": (173.0, 1.369),
}
UPDATES, GENERATED = 1600, 10_000


def main(argv: Sequence[str]) -> None:
    """Times the four models, and prints the table."""
    values = terminal.parse(argv, __doc__)
    variants = {name: terminal.variant(values, name) for name in PAPER}
    for config in variants.values():
        configs.check(config, num_devices=jax.device_count())
    results = terminal.begin(values.config, "four models")
    images = load_images(values.config)
    recipes = {name: workloads.recipe(c, len(images)) for name, c in variants.items()}
    say("training:")
    train = {name: workloads.training(recipe, images) for name, recipe in recipes.items()}
    trained = in_turn(train, values.seconds)
    say("generation:")
    generate = {name: workloads.generation(recipe) for name, recipe in recipes.items()}
    generated = in_turn(generate, values.seconds)
    records = [
        {"model": name}
        | _columns("epoch", trained, name, UPDATES)
        | _columns("10,000 images", generated, name, GENERATED / workloads.GENERATED)
        for name in PAPER
    ]
    print(f"\n{terminal.table(records)}")
    terminal.save(values.json, results | {"models": records})


def load_images(config: ml_collections.ConfigDict) -> workloads.Images:
    """The training images, if the configuration says where they are; else noise."""
    if not config.dataset.data_dir:
        return workloads.noise(config)
    from svae_jax import data  # imports TFDS, which noise does without

    return data.load_of(config.dataset.to_dict(), None, config.dataset.split)


def _columns(what: str, times: dict[str, Seconds], name: str, units: float) -> Record:
    """Seconds of so many units of work, and the ratio to `vector`; here, and in the paper."""
    paper = {model: figures[what != "epoch"] for model, figures in PAPER.items()}
    return {
        f"{what}, s": float(np.median(times[name])) * units,
        f"{what} / vector": ratio(times[name], times["vector"]),
        f"paper, {what}, s": paper[name],
        f"paper, {what} / vector": paper[name] / paper["vector"],
    }


if __name__ == "__main__":
    terminal.run(main)
