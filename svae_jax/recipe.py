"""The static description of a training run, and its streams of random numbers."""

from typing import NamedTuple

import jax
import optax
from jaxtyping import PRNGKeyArray

from svae_jax import seeds
from svae_jax.likelihoods import Likelihood
from svae_jax.model import SpatialVAE
from svae_jax.model.objective import Objective

# Each use of randomness has a stream of its own, so that a change to one leaves the others alone.
_STREAMS = ("init", "latent", "prior", "data", "eval", "sigma", "flip", "preview")


def stream(seed: int, name: str) -> PRNGKeyArray:
    """The root key of one use of randomness: one of `_STREAMS`, whose order stays."""
    return jax.random.fold_in(seeds.key(seed), _STREAMS.index(name))


class Recipe(NamedTuple):
    """Everything static in training and evaluation; hashable.

    Attributes:
        model: the networks, posterior, prior and likelihood.
        objective: what is minimised.
        optimizer: gradients to updates; to finite ones where the gradients' norm is finite.
        ema_decay: decay of the moving average of parameters and statistics; 0 for none.
        max_bad_steps: how many non-finite steps in a row are skipped before training fails.
        batch_size: images a training step, over all devices.
        flip: whether images are flipped at random, left to right, in training.
        seed: the root of all randomness.
    """

    model: SpatialVAE
    objective: Objective
    optimizer: optax.GradientTransformation
    ema_decay: float
    max_bad_steps: int
    batch_size: int
    flip: bool
    seed: int

    @property
    def likelihood(self) -> Likelihood:
        """p(x|z), which knows the images' shape and range."""
        assert self.model.likelihood is not None  # the configuration sets it
        return self.model.likelihood

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.likelihood.image_shape
