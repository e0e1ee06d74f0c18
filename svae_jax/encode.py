"""Writes the latents of a data set: the posteriors' means and standard deviations of a split.

    python -m svae_jax.encode --workdir=runs/shapes --split=train --out=latents.npz

An .npz file holds mean and stddev, float32 [n, h, w, maps] each, an .npy file the means alone, in
the order of the data set. This is what a second stage reads, such as a diffusion model of latents.
The run may still be training: it is only read.
"""

from collections.abc import Sequence

from absl import flags

from svae_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "file to write, .npz or .npy", required=True)
_SPLIT = flags.DEFINE_string(
    "split", "", "images, such as train[:1000]; the run's dataset.split by default"
)
_DATA_DIR = command_line.define_data_dir()


def main(argv: Sequence[str]) -> None:
    """Writes the latents."""
    del argv
    from svae_jax.analysis import encoding

    given = (_WORKDIR.value, _OUT.value, _SPLIT.value)
    print(encoding.write(*given, data_dir=_DATA_DIR.value))


if __name__ == "__main__":
    command_line.run(main)
