"""Draws images from a trained model, or reconstructs pictures of your own.

    python -m svae_jax.sample --workdir=runs/shapes --sampler=flow --num=50000 --out=flow.npz
    python -m svae_jax.sample --workdir=runs/shapes --sampler=gaussian --format=png --out=gaussian
    python -m svae_jax.sample --workdir=runs/a --reconstruct=a.png --reconstruct=b.jpg --out=b.npz

--format=npz writes uint8 arr_0 [n, h, w, 3], grey images with three equal channels (other dtypes
and other numbers of channels stay as they are); --format=png writes a folder of 000000.png and so
on. These are the forms that torch-fidelity, clean-fid and the evaluator of guided diffusion read. A
grid of the first images, or of pictures above their reconstructions, stands beside it: OUT.png.
"""

from collections.abc import Sequence

from absl import flags

from svae_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "file (npz) or folder (png) to write", required=True)
_FORMAT = flags.DEFINE_string("format", "npz", "npz or png")
_SAMPLER = flags.DEFINE_string("sampler", "prior", "prior, or a fitted sampler")
_NUM = flags.DEFINE_integer("num", 64, "number of images")
_SEED = command_line.define_seed("of the images: number i depends on the seed and i alone")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "factor on deviations from the prior's mean")
_NOISE = flags.DEFINE_bool(
    "noise", None, "add the posteriors' noise to latents of the mixture or the flow"
)
_RECONSTRUCT = flags.DEFINE_multi_string("reconstruct", None, "picture file to reconstruct instead")


def main(argv: Sequence[str]) -> None:
    """Writes the images."""
    del argv
    from svae_jax.analysis import drawing

    if _RECONSTRUCT.value:
        pictures = command_line.paths(_RECONSTRUCT.value)
        written = drawing.reconstruct(
            _WORKDIR.value, pictures, _OUT.value, _FORMAT.value, _SEED.value
        )
    else:
        given = {"temperature": _TEMPERATURE.value, "noise": _NOISE.value}
        options = {name: value for name, value in given.items() if value is not None}
        written = drawing.sample(
            _WORKDIR.value,
            _SAMPLER.value,
            _OUT.value,
            _FORMAT.value,
            num=_NUM.value,
            seed=_SEED.value,
            **options,
        )
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    command_line.run(main)
