"""Trains a spatial variational auto-encoder.

    python -m svae_jax.main --config=shapes:best --workdir=runs/shapes

trains the model `best` on the embedded data set. A configuration is one that comes with the package
(celeba, cifar10, images, shapes), or a file such as configs/shapes.py. Behind its colon stands a
model that it names, or a posterior (vector, naive, mvn, lowrank, mvn_full, lowrank_full) and, if
wanted, its options: lowrank,rank=2,d=3,N=128 (height and width d, maps N), or vector,C=150,N=128
(length C; N is that of the spatial model it is compared with). Every field of the configuration can
be given on the command line:

    --config.dataset.data_dir=DIR --config.batch_size=100 --config.objective.sigma=learned

The fields and their defaults are listed in svae_jax/config/fields.py and explained in
configs/README.md of the repository.
Networks are given as text, or follow from the sizes with 'auto':

    --config.model.decoder='3x3/64 3x3/32 5x5/32/s2 5x5/image/s2'

The workdir receives config.json, metrics.jsonl, TensorBoard events, samples/ and reconstructions/
(PNG), checkpoints/ and, at the end, result.json. The same command resumes an interrupted run, and
returns at once if the run is finished.
"""

import functools
import json
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from svae_jax import command_line

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configuration and model, such as shapes:best or FILE.py:lowrank,rank=2"
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
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    100,
    "with --distributed: seconds after which a process that is silent counts as dead, which ends "
    "the others; the same command then goes on from the last checkpoint",
    lower_bound=10,
)
flags.mark_flag_as_required("config")
flags.FLAGS["config"].default_as_str = ""  # there is none, which --help should not call 'None'

_MEMORY_CURE = "lower batch_size, or the size of the model"


def main(argv: Sequence[str]) -> None:
    """Trains, and prints the result."""
    del argv
    import jax

    from svae_jax.devices import processes
    from svae_jax.run import interrupt

    given = (_DISTRIBUTED.value, _HEARTBEAT_TIMEOUT.value)
    ending = functools.partial(command_line.ending, memory_cure=_MEMORY_CURE)
    with processes.joined(*given, ending, agreed=interrupt.Stopped):
        command_line.check_config_file(flags.FLAGS)
        from svae_jax.training import loop

        result = loop.train(_CONFIG.value, _WORKDIR.value)
        if jax.process_index() == 0:
            print(json.dumps(result, indent=2))


if __name__ == "__main__":
    command_line.run(main, memory_cure=_MEMORY_CURE)
