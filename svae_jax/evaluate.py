"""Evaluates trained models on held-out images, with every sampler that is fitted to them.

    python -m svae_jax.evaluate --workdir=runs/shapes
    python -m svae_jax.evaluate --workdir=runs/a --workdir=runs/b --features=efficientnet_lite0

It prints the ELBO, the importance-weighted bound, the quality of reconstructions, the active units,
and for each sampler the distances of its samples to held-out images: one table for all workdirs.
Each workdir receives evaluation.json, with the KL of each map and location besides, and pictures in
evaluation/. The runs may still be training: their checkpoints are only read. One that cannot be
evaluated does not hold up the others.
"""

from collections.abc import Sequence

from absl import flags

from svae_jax import command_line
from svae_jax.errors import UserError

_WORKDIR = flags.DEFINE_multi_string("workdir", None, "directory of a run", required=True)
_SPLIT = flags.DEFINE_string(
    "split", "", "held-out images, such as test[:1000]; the run's dataset.eval_split by default"
)
_IMPORTANCE_SAMPLES = flags.DEFINE_integer(
    "importance_samples", 100, "K of the importance-weighted bound"
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    10_000,
    "images of each sampler, at least 20; no more than there are real ones are compared",
)
_FEATURES = flags.DEFINE_string(
    "features", "", "inception or efficientnet_lite0 (extra fid): distances in their features too"
)
_DATA_DIR = command_line.define_data_dir()
_SEED = command_line.define_seed("of samples and distances")


def main(argv: Sequence[str]) -> None:
    """Evaluates, and prints the tables."""
    del argv
    from svae_jax.analysis import evaluating, tables

    settings = evaluating.Settings(
        split=_SPLIT.value,
        importance_samples=_IMPORTANCE_SAMPLES.value,
        num_samples=_NUM_SAMPLES.value,
        features=_FEATURES.value,
        seed=_SEED.value,
    )
    found, errors = [], []
    for path in command_line.paths(_WORKDIR.value):
        try:
            found.append(evaluating.evaluate(path, settings, data_dir=_DATA_DIR.value))
        except UserError as error:
            errors.append(str(error))
    if found:
        print(tables.evaluations(found), flush=True)
    if errors:
        raise UserError("; ".join(errors))


if __name__ == "__main__":
    command_line.run(main)
