"""Makes a workdir of a trained model that comes with the package, or of a file of `pack`.

    python -m svae_jax.unpack --model=shapes --workdir=runs/pretrained
    python -m svae_jax.evaluate --workdir=runs/pretrained

The commands that read a run take this workdir. Training cannot go on in it: the optimizer's arrays
are not in the file.
"""

from collections.abc import Sequence

from absl import flags

from svae_jax import command_line

_MODEL = flags.DEFINE_string(
    "model", None, "shapes, shapes_vector, cifar10, or a file of pack", required=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory to write", required=True)


def main(argv: Sequence[str]) -> None:
    """Writes the workdir."""
    del argv
    from svae_jax.analysis import packing, pretrained

    packing.unpack(pretrained.file(_MODEL.value), _WORKDIR.value)
    print(_WORKDIR.value)


if __name__ == "__main__":
    command_line.run(main)
