"""The pictures of a run: samples and reconstructions, laid out as grids."""

import numpy as np
from jaxtyping import PyTree, UInt8

from svae_jax.evaluation import grids, steps
from svae_jax.recipe import Recipe, stream

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32

Pixels = UInt8[np.ndarray, "n h w c"]


def draw(
    recipe: Recipe, variables: PyTree, eval_images: Pixels
) -> dict[str, UInt8[np.ndarray, "_h _w c"]]:
    """Draws grids of `samples` from the prior, with the same z each time, and `reconstructions`."""
    originals = np.asarray(eval_images[:_NUM_RECONSTRUCTIONS])
    prior_key, key = (stream(recipe.seed, name) for name in ("prior", "eval"))
    samples = steps.generate(recipe.model, variables, prior_key, _NUM_SAMPLES)
    reconstructions = steps.reconstruct(recipe.model, variables, key, originals)
    return {
        "samples": grids.grid(samples),
        "reconstructions": grids.pairs(originals, reconstructions),
    }
