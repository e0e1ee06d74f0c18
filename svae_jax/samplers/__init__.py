"""Samplers: distributions of latents, fitted to the posteriors of the training images.

A model is trained against its prior, but its decoder only ever sees the aggregate
posterior q(z), the mean over the training images of q(z|x), which is far from the prior. A
sampler is a model of q(z):

| name          | what it draws from                                                               |
|---------------|----------------------------------------------------------------------------------|
| `prior`       | the model's prior, with a temperature                                            |
| `gaussian`    | the Gaussian with the mean and the full covariance of q(z)                       |
| `kronecker`   | a Gaussian with a covariance of rows ⊗ columns ⊗ maps, for any number of latents |
| `mixture`     | a mixture of Gaussians over the principal components of the posteriors' means    |
| `flow`        | flow matching, from a Gaussian to the posteriors' means                          |
| `latent_flow` | the same to samples z of the posteriors, with a density of latents              |

Each is a frozen dataclass of static settings whose `sample` is a pure function of arrays:

    posteriors = aggregate.posteriors(model, variables, images, key)
    sampler = samplers.Gaussian((3, 3, 128))
    params = samplers.fit(sampler, posteriors)
    z = samplers.draw(sampler, params, key, 64)  # [64, 3, 3, 128]
    log_p = sampler.log_prob(sampler.density(params), z)  # [64], nats; not of `flow`
"""

from svae_jax.samplers.aggregate import Posteriors
from svae_jax.samplers.base import (
    MOST_LATENTS,
    Density,
    Sampler,
    draw,
    draw_batches,
    fit,
    image_keys,
)
from svae_jax.samplers.flow import Flow, LatentFlow
from svae_jax.samplers.gaussian import Gaussian
from svae_jax.samplers.kronecker import Kronecker
from svae_jax.samplers.mixture import Mixture
from svae_jax.samplers.prior import Prior

__all__ = [
    "MOST_LATENTS",
    "TABLE",
    "Density",
    "Flow",
    "Gaussian",
    "Kronecker",
    "LatentFlow",
    "Mixture",
    "Posteriors",
    "Prior",
    "Sampler",
    "draw",
    "draw_batches",
    "fit",
    "image_keys",
    "names",
]

# name -> class; a new sampler is one more row
TABLE: dict[str, type] = {
    "prior": Prior,
    "gaussian": Gaussian,
    "kronecker": Kronecker,
    "mixture": Mixture,
    "flow": Flow,
    "latent_flow": LatentFlow,
}


def names() -> tuple[str, ...]:
    """The names of the samplers."""
    return tuple(TABLE)
