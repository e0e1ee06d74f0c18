"""The objective: the training loss, and bounds on log p(x).

All quantities are per image, summed over pixels and latents and averaged over nothing but the
batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from svae_jax import latents
from svae_jax.likelihoods import Likelihood

SCALINGS = ("elbo", "released_code")


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Attributes:
        beta: weight of the KL; 1 is the ELBO.
        beta_warmup_steps: training steps in which the weight grows linearly to beta, which the
            last of them has.
        free_bits: λ in nats per map; a map whose mean KL is below λ is not pushed further down.
        scaling: "elbo", or "released_code": the mean squared error over pixels plus the mean KL
            over latents, which the paper's authors' code minimises. It has no β or free bits.

    Raises:
        ValueError: for a value outside its range; the message names field, value and range.
    """

    beta: float = 1.0
    beta_warmup_steps: int = 0
    free_bits: float = 0.0
    scaling: str = "elbo"

    def __post_init__(self):
        """Checks every field."""
        for field in ("beta", "free_bits"):
            if not (math.isfinite(value := getattr(self, field)) and value >= 0):
                raise ValueError(f"{field} must be a finite number, 0 or above, got {value}")
        if self.beta_warmup_steps < 0:
            raise ValueError(f"beta_warmup_steps must be 0 or above, got {self.beta_warmup_steps}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        if self.scaling == "released_code":
            plain = Objective()
            for field in ("beta", "beta_warmup_steps", "free_bits"):
                if (value := getattr(self, field)) != getattr(plain, field):
                    raise ValueError(
                        f"{field}={value} cannot be combined with scaling='released_code', which "
                        "minimises mean squared error plus mean KL; leave it at its default"
                    )

    def kl_weight(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """β at this step, warm-up included."""
        progress = (step + 1) / max(self.beta_warmup_steps, 1)
        return self.beta * jnp.minimum(1.0, progress)


class TrainingLoss(NamedTuple):
    """A training loss and what it is made of; scalars.

    Attributes:
        loss: what is minimised; nats an image for `scaling="elbo"`.
        reconstruction: E_q[log p(x|z)], nats an image, from one sample of z.
        kl: KL(q(z|x) ‖ p(z)), nats an image.
        sigma: the likelihood's scale, in units of x in [-1, 1] (see `Likelihood.reported_sigma`).
    """

    loss: Float[Array, ""]
    reconstruction: Float[Array, ""]
    kl: Float[Array, ""]
    sigma: Float[Array, ""]


def training_loss(
    objective: Objective,
    likelihood: Likelihood,
    step: Int[Array, ""],
    images: Float[Array, "b h w c"],
    outputs: Float[Array, "b h w k"],
    kl_per_map: Float[Array, "b n"],
    *,
    num_latents: int,
    log_sigma: Float[Array, "..."] | None,
) -> TrainingLoss:
    """The loss of a batch (paper Eq. 1, averaged over the batch and negated).

    Args:
        objective: what is minimised.
        likelihood: p(x|z).
        step: number of training steps made so far, for the warm-up of β.
        images: the batch, in [-1, 1].
        outputs: of the decoder, for one sample of z an image.
        kl_per_map: the divergences of the posteriors from the prior in nats.
        num_latents: Z, the number of latents of an image.
        log_sigma: the parameter, where σ is learned.
    """
    scale = likelihood.training_scale(images, outputs, log_sigma)
    reconstruction = likelihood.mean_log_prob(scale, images, outputs)
    kl_of_map = jnp.mean(kl_per_map, axis=0)
    kl = jnp.sum(kl_of_map)
    if objective.scaling == "released_code":
        error = jnp.mean(likelihood.error(images, outputs))
        loss = error / math.prod(images.shape[1:]) + kl / num_latents
    else:
        weighted = jnp.sum(jnp.maximum(objective.free_bits, kl_of_map))
        loss = objective.kl_weight(step) * weighted - reconstruction
    return TrainingLoss(loss, reconstruction, kl, likelihood.reported_sigma(scale))


def bits_per_dim(nats: Float[Array, "*b"] | float, num_dims: int) -> Float[Array, "*b"] | float:
    """Bits per pixel and channel of a log-likelihood in nats per image: −nats / (D·log 2)."""
    return -nats / (num_dims * math.log(2))


LogLikelihood = TypeVar("LogLikelihood", bound=PyTree[Float[Array, "..."]])


def log_importance_weights(
    key: PRNGKeyArray,
    posterior: latents.Posterior,
    params: latents.Params,
    log_likelihood: Callable[[Float[Array, "*b h w n"]], LogLikelihood],
    log_prior: Callable[[Float[Array, "*b h w n"]], Float[Array, "*b"]],
    *,
    num_samples: int,
    chunk_size: int = 1,
) -> LogLikelihood:
    """log p(x|z) + log p(z) − log q(z|x) for K samples z of the posterior, in nats.

    Their mean over K is an estimate of the ELBO, their logsumexp − log K of the importance-weighted
    bound (Burda et al. 2016). The samples are the same whatever `chunk_size` is.

    Args:
        key: random key.
        posterior: q.
        params: the arrays of q, with batch axes *b.
        log_likelihood: z [*b, h, w, n] -> log p(x|z) [*b], or a pytree of several likelihoods.
        log_prior: z [*b, h, w, n] -> log p(z) [*b].
        num_samples: K.
        chunk_size: how many samples are decoded at a time, which bounds the memory.

    Returns:
        As `log_likelihood` returns, each leaf [K, *b].
    """

    def weigh(key: PRNGKeyArray) -> LogLikelihood:
        z, log_q = posterior.sample_and_log_prob(key, params)
        log_p_z = log_prior(z)
        return jax.tree.map(lambda log_p: log_p + log_p_z - log_q, log_likelihood(z))

    return jax.lax.map(weigh, jax.random.split(key, num_samples), batch_size=chunk_size)


def importance_weighted_bound(log_weights: Float[Array, "k *b"]) -> Float[Array, "*b"]:
    """A lower bound on log p(x) in nats from K log-weights: logsumexp − log K."""
    return logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])
