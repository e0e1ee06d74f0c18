"""The objective: Gaussian likelihoods of images, the training loss, and bounds on log p(x).

All quantities are per image, summed over pixels and latents and averaged over nothing but the
batch. Images and their means are in [-1, 1]; the likelihood is N(x; f(z), σ²I).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from svae_jax import latents

SCALINGS = ("elbo", "released_code")

# The optimal σ is kept from collapsing on images that are reproduced exactly (Rybkin et al. 2021).
# Half a bin of an 8-bit image is 0.0039.
MIN_SIGMA = math.exp(-6.0)

_HALF_BIN = 1.0 / 255.0  # half the distance of two of the 256 levels in [-1, 1]


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Attributes:
        sigma: "optimal" (the root mean squared error of the batch, the analytic maximiser of the
            likelihood; Rybkin et al. 2021), "learned" (one scalar), or a number as text.
        beta: weight of the KL; 1 is the ELBO.
        beta_warmup_steps: steps in which the weight grows linearly to beta, which the last has.
        free_bits: λ in nats per map; a map whose mean KL is below λ is not pushed further down.
        scaling: "elbo", or "released_code": the mean squared error over pixels plus the mean KL
            over latents, which the paper's authors' code minimises. It has no σ, β or free bits.

    Raises:
        ValueError: for a value outside its range; the message names field, value and range.
    """

    sigma: str = "optimal"
    beta: float = 1.0
    beta_warmup_steps: int = 0
    free_bits: float = 0.0
    scaling: str = "elbo"

    def __post_init__(self):
        """Checks every field."""
        if self.sigma not in ("optimal", "learned") and not _is_positive_number(self.sigma):
            raise ValueError(
                f"sigma must be 'optimal', 'learned' or a number above 0, got {self.sigma!r}"
            )
        for field in ("beta", "free_bits"):
            if not (math.isfinite(value := getattr(self, field)) and value >= 0):
                raise ValueError(f"{field} must be a finite number, 0 or above, got {value}")
        if self.beta_warmup_steps < 0:
            raise ValueError(f"beta_warmup_steps must be 0 or above, got {self.beta_warmup_steps}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        if self.scaling == "released_code":
            plain = Objective()
            for field in ("sigma", "beta", "beta_warmup_steps", "free_bits"):
                if (value := getattr(self, field)) != getattr(plain, field):
                    raise ValueError(
                        f"{field}={value} has no place in scaling='released_code', which minimises "
                        "mean squared error plus mean KL; leave it at its default"
                    )

    @property
    def learns_sigma(self) -> bool:
        """Whether σ is a parameter of the model."""
        return self.sigma == "learned"

    @property
    def fixed_sigma(self) -> float | None:
        """σ where it is a given number."""
        return None if self.sigma in ("optimal", "learned") else float(self.sigma)

    def kl_weight(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """β at this step, warm-up included."""
        progress = (step + 1) / max(self.beta_warmup_steps, 1)
        return self.beta * jnp.minimum(1.0, progress)


def _is_positive_number(text: str) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    return math.isfinite(number) and number > 0


class TrainingLoss(NamedTuple):
    """A training loss and what it is made of; scalars.

    Attributes:
        loss: what is minimised; nats an image for `scaling="elbo"`.
        reconstruction: E_q[log p(x|z)], nats an image, from one sample of z.
        kl: KL(q(z|x) ‖ p(z)), nats an image.
        sigma: the likelihood's standard deviation, in units of x in [-1, 1].
    """

    loss: Float[Array, ""]
    reconstruction: Float[Array, ""]
    kl: Float[Array, ""]
    sigma: Float[Array, ""]


def training_loss(
    objective: Objective,
    step: Int[Array, ""],
    images: Float[Array, "b h w c"],
    means: Float[Array, "b h w c"],
    kl_per_map: Float[Array, "b n"],
    *,
    num_latents: int,
    log_sigma: Float[Array, ""] | None,
) -> TrainingLoss:
    """The loss of a batch (paper Eq. 1, averaged over the batch and negated).

    Args:
        objective: what is minimised.
        step: number of updates made so far, for the warm-up of β.
        images: the batch, in [-1, 1].
        means: f(z), one sample of z an image.
        kl_per_map: the posteriors' divergences in nats.
        num_latents: Z, the number of latents of an image.
        log_sigma: the parameter, where σ is learned.
    """
    num_dims = math.prod(images.shape[1:])
    error = jnp.mean(squared_error(images, means))
    sigma = _training_sigma(objective, error / num_dims, log_sigma)
    # Written with the mean error, and σ a constant where it is optimal: the maximum has no slope
    # in σ.
    reconstruction = -0.5 * error / sigma**2 - num_dims * (
        jnp.log(sigma) + 0.5 * math.log(2 * math.pi)
    )
    kl_of_map = jnp.mean(kl_per_map, axis=0)
    kl = jnp.sum(kl_of_map)
    if objective.scaling == "released_code":
        loss = error / num_dims + kl / num_latents
    else:
        weighted = jnp.sum(jnp.maximum(objective.free_bits, kl_of_map))
        loss = objective.kl_weight(step) * weighted - reconstruction
    return TrainingLoss(loss, reconstruction, kl, sigma)


def _training_sigma(
    objective: Objective, mean_squared_error: Float[Array, ""], log_sigma: Float[Array, ""] | None
) -> Float[Array, ""]:
    if log_sigma is not None:
        return jnp.exp(log_sigma)
    if objective.fixed_sigma is not None:
        return jnp.asarray(objective.fixed_sigma, mean_squared_error.dtype)
    return jax.lax.stop_gradient(optimal_sigma(mean_squared_error))


def optimal_sigma(mean_squared_error: Float[Array, "..."]) -> Float[Array, "..."]:
    """The σ of highest likelihood for this mean squared error: its root, at least MIN_SIGMA."""
    # The maximum is inside the root, whose slope at 0 is infinite.
    return jnp.sqrt(jnp.maximum(mean_squared_error, MIN_SIGMA**2))


def squared_error(
    images: Float[Array, "*b h w c"], means: Float[Array, "*b h w c"]
) -> Float[Array, "*b"]:
    """Squared error of each image, summed over pixels and channels."""
    return jnp.sum(jnp.square(images - means), axis=(-3, -2, -1))


def gaussian_log_prob(
    images: Float[Array, "*b h w c"],
    means: Float[Array, "*b h w c"],
    sigma: Float[Array, ""] | float,
) -> Float[Array, "*b"]:
    """log N(x; means, σ²I) in nats: the density of images in [-1, 1]."""
    num_dims = math.prod(images.shape[-3:])
    constant = num_dims * (jnp.log(sigma) + 0.5 * math.log(2 * math.pi))
    return -0.5 * squared_error(images, means) / sigma**2 - constant


def discretized_gaussian_log_prob(
    images: Float[Array, "*b h w c"],
    means: Float[Array, "*b h w c"],
    sigma: Float[Array, ""] | float,
) -> Float[Array, "*b"]:
    """log P(x) in nats for 8-bit images: the Gaussian's mass in the bin of each level.

    The 256 levels k stand at k/127.5 − 1. The first and last bin take the tails, so the masses of a
    pixel sum to 1.
    """
    upper = (images + _HALF_BIN - means) / sigma
    lower = (images - _HALF_BIN - means) / sigma
    # Φ(upper) − Φ(lower) = Φ(−lower) − Φ(−upper): taken in the lower tail, where log Φ is precise.
    flip = images > means
    high, low = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    log_high = log_ndtr(high)
    log_mass = log_high + jnp.log1p(-jnp.exp(log_ndtr(low) - log_high))
    log_mass = jnp.where(images > 1 - _HALF_BIN, log_ndtr(-lower), log_mass)  # 1 − Φ(lower)
    log_mass = jnp.where(images < -1 + _HALF_BIN, log_ndtr(upper), log_mass)
    return jnp.sum(log_mass, axis=(-3, -2, -1))


def bits_per_dim(nats: Float[Array, "*b"] | float, num_dims: int) -> Float[Array, "*b"] | float:
    """Bits per pixel and channel of a log-likelihood in nats per image: −nats / (D·log 2)."""
    return -nats / (num_dims * math.log(2))


LogLikelihood = TypeVar("LogLikelihood", bound=PyTree[Float[Array, "..."]])


def log_importance_weights(
    key: PRNGKeyArray,
    posterior: latents.Posterior,
    params: latents.Params,
    log_likelihood: Callable[[Float[Array, "*b h w n"]], LogLikelihood],
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
        params: the numbers of q, with batch axes *b.
        log_likelihood: z [*b, h, w, n] -> log p(x|z) [*b], or a pytree of several likelihoods.
        num_samples: K.
        chunk_size: how many samples are decoded at a time, which bounds the memory.

    Returns:
        As `log_likelihood` returns, each leaf [K, *b].
    """

    def weigh(key: PRNGKeyArray) -> LogLikelihood:
        z, log_q = posterior.sample_and_log_prob(key, params)
        log_prior = -0.5 * jnp.sum(z**2, axis=(-3, -2, -1)) - 0.5 * math.log(
            2 * math.pi
        ) * math.prod(z.shape[-3:])
        return jax.tree.map(lambda log_p: log_p + log_prior - log_q, log_likelihood(z))

    return jax.lax.map(weigh, jax.random.split(key, num_samples), batch_size=chunk_size)


def importance_weighted_bound(log_weights: Float[Array, "k *b"]) -> Float[Array, "*b"]:
    """A lower bound on log p(x) in nats from K log-weights: logsumexp − log K."""
    return logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])
