"""Train a spatial variational auto-encoder.

    python -m svae_jax.main --config=configs/shapes.py:lowrank --workdir=runs/shapes

trains the model `lowrank` on the embedded data set. Behind the colon stands a posterior (vector,
naive, mvn, lowrank, mvn_full, lowrank_full) and, if wanted, its options: lowrank,rank=2,d=3,N=128
(height and width d, maps N), or vector,C=150,N=128 (length C; N is that of the spatial model it is
compared with). Every field of the configuration can be given on the command line:

    --config.dataset.data_dir=DIR --config.batch_size=100 --config.objective.sigma=learned

The fields and their defaults are listed in svae_jax/config.py. The workdir receives config.json,
metrics.jsonl, TensorBoard events, samples/ and reconstructions/ (PNG), checkpoints/ and, at the
end, result.json. The same command goes on where a run was interrupted, and returns at once where
it is finished.
"""

import json
import os
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from svae_jax import command_line
from svae_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration and posterior, such as configs/cifar10.py:lowrank,rank=2"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of this run; made where it is missing", required=True
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "train on several processes: 'auto' on a cluster that JAX detects (Slurm, Open MPI, "
    "Kubernetes, TPU), else COORDINATOR_HOST:PORT,NUM_PROCESSES,PROCESS_ID",
)
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
    """Train, and print the result."""
    del argv
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: there is no such file")
    # Imported late, so that --help and a mistyped flag answer at once.
    from svae_jax.data import cache
    from svae_jax.devices import runtime

    runtime.keep_freed_memory()
    runtime.keep_compiled_programs(cache.home() / "compiled")
    import jax

    from svae_jax.training import loop

    _join(_DISTRIBUTED.value)
    result = loop.train(_CONFIG.value, _WORKDIR.value)
    if jax.process_index() == 0:
        print(json.dumps(result, indent=2))


def _join(distributed: str | None) -> None:
    import jax

    if distributed == "auto":
        jax.distributed.initialize()
    elif distributed:
        try:
            address, num_processes, process_id = distributed.split(",")
            numbers = int(num_processes), int(process_id)
        except ValueError:
            raise UserError(
                f"--distributed={distributed} must be 'auto' or HOST:PORT,NUM_PROCESSES,PROCESS_ID"
            ) from None
        jax.distributed.initialize(address, *numbers)


def _fields() -> list[str]:
    from svae_jax import config

    return list(config.flatten(config.base().to_dict()))


def run() -> None:
    """The command line: a user's mistake is one line and exit code 2."""
    command_line.run(main, _fields)


if __name__ == "__main__":
    run()
