"""Writes a trained model as one small file, for colleagues and other machines.

    python -m svae_jax.pack --workdir=runs/shapes --out=shapes.npz

The file holds the configuration, the metrics, the newest checkpoint without the optimizer's arrays,
large arrays as float16, and the samplers fitted to that checkpoint; no images and no paths.
`svae_jax.pretrained("shapes.npz")` opens it, and this makes a workdir of it for the other commands:

    python -m svae_jax.unpack --model=shapes.npz --workdir=runs/shapes
"""

from collections.abc import Sequence

from absl import flags

from svae_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "file to write, .npz", required=True)


def main(argv: Sequence[str]) -> None:
    """Writes the file."""
    del argv
    from svae_jax.analysis import packing

    path = packing.pack(_WORKDIR.value, _OUT.value)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    command_line.run(main)
