"""The pictures of a run: samples and reconstructions, laid out as grids."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree, UInt8

from svae_jax import samplers
from svae_jax.evaluation import grids, steps
from svae_jax.recipe import Recipe, stream
from svae_jax.samplers import aggregate

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32
# Images to which the Gaussian is fitted: this share of those trained on since the last picture,
# so that the fit takes under 1% of the time of training; and at most so many.
_FITTED_SHARE = 1 / 50
_MOST_FITTED = 2000

Pixels = Num[np.ndarray, "n h w c"]


def draw(
    recipe: Recipe,
    variables: PyTree,
    train_images: Num[np.ndarray, "m h w c"],
    eval_images: Pixels,
    sample_every: int,
) -> dict[str, UInt8[np.ndarray, "_h _w _c"]]:
    """Grids of samples and reconstructions.

    Args:
        recipe: what is trained.
        variables: the evaluated variables.
        train_images: some of them are encoded, see `samples_gaussian`.
        eval_images: held-out images; the first are reconstructed.
        sample_every: updates between two pictures.

    Returns:
        `samples` from the prior, always of the same z; `samples_gaussian` from the aggregate
        posterior's Gaussian (above 8,192 latents, the one of rows ⊗ columns ⊗ maps), fitted to
        evenly spaced training images, always of the same noise;
        and `reconstructions`. Where the posteriors' covariance is not finite, there is no
        `samples_gaussian`.
    """
    originals = np.asarray(eval_images[:_NUM_RECONSTRUCTIONS])
    shown = recipe.model.pixels.to_float(originals)
    prior_key, key = (stream(recipe.seed, name) for name in ("prior", "eval"))
    samples = steps.generate(recipe.model, variables, prior_key, _NUM_SAMPLES)
    reconstructions = steps.reconstruct(recipe.model, variables, key, originals)
    pictures = {
        "samples": grids.grid(samples),
        "reconstructions": grids.pairs(shown, reconstructions),
    }
    wanted = int(_FITTED_SHARE * sample_every * recipe.batch_size)
    count = min(max(wanted, 2), _MOST_FITTED, len(train_images))
    chosen = train_images[np.linspace(0, len(train_images) - 1, count).astype(int)]
    z = _draw_from_gaussian(recipe, variables, chosen)
    if z is not None:
        pictures["samples_gaussian"] = grids.grid(steps.decode(recipe.model, variables, z))
    return pictures


def _draw_from_gaussian(
    recipe: Recipe, variables: PyTree, images: Num[np.ndarray, "m h w c"]
) -> Float[Array, "b _h _w n"] | None:
    """Latents from the Gaussian of the aggregate posterior of these images, if it is finite."""
    model, key = recipe.model, stream(recipe.seed, "prior")
    shape = (model.posterior.height, model.posterior.width, model.posterior.maps)
    is_small = model.num_latents <= samplers.MOST_LATENTS
    sampler = samplers.Gaussian(shape) if is_small else samplers.Kronecker(shape)
    try:
        params = samplers.fit(sampler, aggregate.posteriors(model, variables, images, key))
    except ValueError:  # a picture is no reason to end a run
        return None
    return jnp.asarray(samplers.draw(sampler, params, key, _NUM_SAMPLES))
