"""The pictures of a run: samples and reconstructions, laid out as grids."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, PyTree, UInt8

from svae_jax import samplers
from svae_jax.devices import batches
from svae_jax.evaluation import grids, steps
from svae_jax.recipe import Recipe, stream
from svae_jax.samplers import aggregate

_NUM_SAMPLES = 64
_NUM_RECONSTRUCTIONS = 32
# Images to which the Gaussian is fitted: this share of those trained on since the last picture,
# so that the fit takes under 1% of the time of training; and at most so many.
_FITTED_SHARE = 1 / 50
_MOST_FITTED = 2000
# Above so many latents, their full covariance and its factor would take gigabytes for a picture.
_MOST_LATENTS = 4096

Pixels = Num[np.ndarray, "n h w c"]


def draw(
    recipe: Recipe,
    variables: PyTree,
    train_images: Num[np.ndarray, "m h w c"],
    eval_images: Pixels,
    sample_every: int,
    mesh: Mesh,
) -> dict[str, UInt8[np.ndarray, "_h _w _c"]]:
    """Grids of samples and reconstructions.

    Args:
        recipe: what is trained.
        variables: the evaluated variables.
        train_images: some of them are encoded, see `samples_gaussian`.
        eval_images: held-out images; the first are reconstructed.
        sample_every: training steps between two pictures.
        mesh: the devices.

    Returns:
        `samples` from the prior, always of the same z; `samples_gaussian` from the aggregate
        posterior's Gaussian (above 4,096 latents, the one of rows ⊗ columns ⊗ maps), fitted to
        evenly spaced training images, always of the same noise;
        and `reconstructions`. Where the posteriors' covariance is not finite, there is no
        `samples_gaussian`.
    """
    z = recipe.model.sample_prior(stream(recipe.seed, "prior"), _NUM_SAMPLES, variables)
    originals = np.asarray(eval_images[:_NUM_RECONSTRUCTIONS])
    shown = recipe.model.pixels.to_float(originals)
    reconstructions = _reconstructed(recipe, variables, originals, mesh)
    pictures = {
        "samples": grids.grid(_decoded(recipe, variables, z, mesh)),
        "reconstructions": grids.pairs(shown, reconstructions),
    }
    wanted = int(_FITTED_SHARE * sample_every * recipe.batch_size)
    count = min(max(wanted, 2), _MOST_FITTED, len(train_images))
    chosen = np.linspace(0, len(train_images) - 1, count).astype(int)
    drawn = _draw_from_gaussian(recipe, variables, train_images, chosen, mesh)
    if drawn is not None:
        pictures["samples_gaussian"] = grids.grid(_decoded(recipe, variables, drawn, mesh))
    return pictures


def _reconstructed(
    recipe: Recipe, variables: PyTree, originals: Pixels, mesh: Mesh
) -> Float[np.ndarray, "n h w c"]:
    """The images of one sample of each posterior, which do not depend on the size of batches."""
    params = batches.gather(
        lambda batch: steps.encode(recipe.model, variables, batch.rows),
        originals,
        size=_batch_size(recipe, len(originals)),
        mesh=mesh,
    )
    params = jax.tree.map(jnp.asarray, params)
    z = recipe.model.posterior.sample(stream(recipe.seed, "eval"), params)
    return _decoded(recipe, variables, z, mesh)


def _decoded(
    recipe: Recipe, variables: PyTree, z: Float[Array, "b _h _w n"], mesh: Mesh
) -> Float[np.ndarray, "b h w c"]:
    return batches.gather(
        lambda batch: steps.decode(recipe.model, variables, batch.rows),
        np.asarray(z),
        size=_batch_size(recipe, len(z)),
        mesh=mesh,
    )


def _batch_size(recipe: Recipe, count: int) -> int:
    """Images at a time, in the memory that training takes."""
    return batches.size_for(recipe.image_shape, min(count, recipe.batch_size))


def _draw_from_gaussian(
    recipe: Recipe,
    variables: PyTree,
    images: Num[np.ndarray, "m h w c"],
    chosen: Int[np.ndarray, " k"],
    mesh: Mesh,
) -> Float[Array, "b _h _w n"] | None:
    """Latents from the Gaussian of the aggregate posterior of chosen images, if it is finite."""
    model, shape = recipe.model, recipe.model.posterior.shape
    of_posteriors, of_draws = jax.random.split(stream(recipe.seed, "preview"))
    is_small = model.num_latents <= _MOST_LATENTS
    sampler = samplers.Gaussian(shape) if is_small else samplers.Kronecker(shape)
    try:
        posteriors = aggregate.posteriors(
            model, variables, images, of_posteriors, mesh, chosen=chosen
        )
        params = samplers.fit(sampler, posteriors)
    except ValueError:  # a picture is no reason to end a run
        return None
    return samplers.draw(sampler, params, of_draws, _NUM_SAMPLES, mesh=mesh)
