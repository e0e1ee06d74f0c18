"""Shows trained runs side by side, as one page that opens in any browser.

    python -m svae_jax.explore --workdir=runs/shapes --out=report.html
    python -m svae_jax.explore --workdir=runs/lowrank --workdir=runs/vector --out=report.html

It holds the configurations, the training curves, samples of every fitted sampler, reconstructions,
edits of latent cells, interpolation, directions, how far each cell reaches, the KL of each
location, and the table of `python -m svae_jax.evaluate`, if that has run. Pictures are inside the
file: it loads nothing and runs no script. The runs may still be training: they are only read.
"""

from collections.abc import Sequence

from absl import flags

from svae_jax import command_line

_WORKDIR = flags.DEFINE_multi_string("workdir", None, "directory of a run", required=True)
_OUT = flags.DEFINE_string("out", None, "HTML file to write", required=True)
_DATA_DIR = command_line.define_data_dir()
_SEED = command_line.define_seed("of the samples")


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    del argv
    from svae_jax.analysis.report import page

    print(page.write(command_line.paths(_WORKDIR.value), _OUT.value, _SEED.value, _DATA_DIR.value))


if __name__ == "__main__":
    command_line.run(main)
