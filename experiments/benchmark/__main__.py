"""Speed of training and generation against plain Flax and PyTorch, and how cost grows.

    python -m experiments.benchmark --config=configs/celeba.py:lowrank --json=benchmark.json

No data set is needed: images are noise in the configuration's shape. The parts, by --parts:

    training    images a second of training, beside the same network of plain Flax layers and in
                PyTorch, eager and with torch.compile (if installed: pip install -e '.[bench]')
    generation  the same for generating images
    batch_size  training and generation against the batch size,
    maps        against the number N of maps,
    size        and against the size d of a map
    memory      peak memory and speed of training on an array as large as CelebA's, resident and
                streamed; writes 2 GB to a temporary directory
    main        a run of svae_jax.main on the embedded data set: seconds to the first step, and
                throughput with logs, samples and checkpoints; takes 1,000 updates

Before baselines are timed, they are checked to compute the same losses, gradients and images from
the same parameters, images and noise. Each baseline has a process of its own, and all run in turn.
Tables show medians and quartiles; a ratio is the median of the rounds' ratios. On a GPU all round
the factors of float32 products to TF32. Measure on an idle machine: on a busy CPU PyTorch loses
most, since its threads wait for each other. Baselines use one device: with several GPUs, set
CUDA_VISIBLE_DEVICES=0.
"""

import contextlib
import importlib.util
from collections.abc import Sequence

import jax
import ml_collections

from experiments.benchmark import baselines, options, processes, report, workloads
from experiments.benchmark.stopwatch import Record, in_turn, ratio, say, throughput
from svae_jax import config as configs
from svae_jax.errors import UserError

_OURS = "svae_jax"
_COMPARED = ("training", "generation")
_SCALED = {"batch_size": "batch size", "maps": "N", "size": "d"}
_PARTS = (*_COMPARED, *_SCALED, "memory", "main")


def main(argv: Sequence[str]) -> None:
    """Measures the parts asked for, and prints a table of each."""
    values = options.parse(
        argv,
        __doc__,
        parts=("training,generation", _PARTS),
        against=("plain,pytorch", tuple(baselines.NAMES)),
    )
    config, against = values.config, values.against
    configs.check(config, num_devices=jax.device_count())
    if "pytorch" in against and importlib.util.find_spec("torch") is None:
        say("PyTorch is not installed and is left out; pip install -e '.[bench]' installs it")
        against.remove("pytorch")
    results = report.begin(config)
    if not {*_COMPARED}.isdisjoint(values.parts):
        results["differences"] = baselines.check_same(config, against)
    for part in values.parts:
        say(f"{part}:")
        if part in _COMPARED:
            records = comparison(part, config, against, values.seconds)
        elif part in _SCALED:
            records = scaling(part, config, values.seconds)
        else:
            measure = processes.memory if part == "memory" else processes.whole_run
            records = measure(config, values.seconds)
        print(f"\n{part}\n\n{report.table(records)}", flush=True)
        results[part] = records
        report.save(values.json, results)  # after each part: a later one may fail


def comparison(
    part: str, config: ml_collections.ConfigDict, against: Sequence[str], seconds: float
) -> list[Record]:
    """Training or generation: a row for this project, and one for each baseline."""
    recipe = workloads.recipe(config)
    if part == "training":
        ours, images = workloads.training(recipe, workloads.noise(config)), config.batch_size
    else:
        ours, images = workloads.generation(recipe), workloads.GENERATED
    contenders = {_OURS: ours}
    with contextlib.ExitStack() as stack:
        for name in (name for group in against for name in baselines.NAMES[group]):
            process = processes.OwnProcess(baselines.contender, part, name, config.to_json())
            contenders[name] = stack.enter_context(process)
            say(f"  {name}: a first call")
            try:
                contenders[name](1)
            except UserError as error:  # torch.compile needs a C++ compiler, or Triton
                say(f"  {name} fails and is left out: {error}")
                del contenders[name]
        times = in_turn(contenders, seconds)
    return [
        {"implementation": name}
        | throughput(taken, images)
        | {f"speed of {_OURS} / this": ratio(taken, times[_OURS])}
        for name, taken in times.items()
    ]


def scaling(part: str, config: ml_collections.ConfigDict, seconds: float) -> list[Record]:
    """Training and generation for several batch sizes, numbers of maps, or sizes of a map."""
    fields, values = _varied(part, config)
    images = workloads.noise(config)
    recipes, batches = {}, {}
    for value in sorted(set(values)):
        changed = ml_collections.ConfigDict(config.to_dict())
        changed.update_from_flattened_dict(dict.fromkeys(fields, value))
        name = f"{_SCALED[part]}={value}"
        recipes[name] = workloads.recipe(changed)
        batches[name] = value if part == "batch_size" else workloads.GENERATED
    trained = in_turn({n: workloads.training(r, images) for n, r in recipes.items()}, seconds)
    generated = in_turn(
        {n: workloads.generation(r, count=batches[n]) for n, r in recipes.items()}, seconds
    )
    return [
        {
            "variant": name,
            "training, images/s": throughput(trained[name], recipe.batch_size)["images/s"],
            "generation, images/s": throughput(generated[name], batches[name])["images/s"],
        }
        for name, recipe in recipes.items()
    ]


def _varied(part: str, config: ml_collections.ConfigDict) -> tuple[list[str], list[int]]:
    """The fields that a part changes, and the values that it gives to them."""
    if part == "batch_size":
        n = jax.device_count()
        each = config.batch_size / n
        return ["batch_size"], [n * max(1, round(x * each)) for x in (0.1, 0.3, 1, 3, 10)]
    if part == "maps":
        return ["latent.maps"], [max(1, config.latent.maps * x // 4) for x in (1, 2, 4, 8, 16)]
    sizes = [d for d in (2, 3, 4, 6, 8) if d >= config.latent.rank]
    return ["latent.height", "latent.width"], sizes


if __name__ == "__main__":
    options.run(main)
