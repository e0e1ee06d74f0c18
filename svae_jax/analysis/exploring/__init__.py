"""Exploring a trained run: `load` gives a `Run`, whose methods a notebook calls.

    run = svae_jax.load("runs/shapes")
    a, b = run.images("test[:2]")
    changed = run.edit(a, b, run.cell(0, 2))  # the upper right of b in a
    figures.edits(a, b, changed, run.cell(0, 2))  # from svae_jax.analysis

The methods take images as users have them (see `images.prepare`), run compiled functions in batches
of one size (`batches`), and return NumPy arrays with the batch in front. Images have the units and
the dtype of the run's data. What needs no model stands in `paths` and `locality`, as pure
functions; the pictures stand in `svae_jax.analysis.figures`.
"""

from svae_jax.analysis.exploring.run import Encoding, KLMap, Run, load

__all__ = ["Encoding", "KLMap", "Run", "load"]
