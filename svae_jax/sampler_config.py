"""The settings of the samplers' fits: their fields, checks, and the samplers built from them."""

import math
from typing import Any

import ml_collections

from svae_jax import config as configs
from svae_jax import samplers
from svae_jax.errors import UserError

Shape = tuple[int, int, int]

# Where a long fit reports and saves; the numbers do not depend on it.
_FREE_ON_RESUME = ("flow.log_every", "flow.checkpoint_every")


def base() -> ml_collections.ConfigDict:
    """All fields with their defaults; each section is of the sampler of its name."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "mixture": {
                "components": 10,
                "share": 0.9,  # of the means' variance, held by the modelled principal components
            },
            "flow": {
                "width": 192,  # features of a token
                "depth": 3,  # blocks of the transformer
                "num_params": 2_000_000,  # of the network, for latents of every shape
                "num_steps": 2000,
                "batch_size": 256,
                "learning_rate": 1e-3,  # at its peak; it decays to 0 along a cosine
                "ema_decay": 0.999,  # of the weights' average, with which samples are drawn
                "log_every": 50,
                "checkpoint_every": 500,
            },
        }
    )


def check(config: ml_collections.ConfigDict, name: str) -> None:
    """Validates every field for the fit of the sampler `name`.

    Raises:
        UserError: naming the first field that is wrong, its value and what is allowed; or a field
            that was changed and is of another sampler.
    """
    for field, default in configs.flatten(base().to_dict()).items():
        value = configs.get_field(config, field)
        section, _, _ = field.rpartition(".")
        if section not in ("", name) and value != default:
            raise UserError(
                f"{field}={value!r} is a setting of --sampler={section}, not of --sampler={name}"
            )
        configs.check_type(field, value, type(default))
    configs.require(config, "seed", lambda value: 0 <= value < 2**32, "between 0 and 2^32 - 1")
    configs.require(config, "mixture.share", lambda value: 0 < value <= 1, "above 0, at most 1")
    for field in (
        "mixture.components",
        *(f"flow.{f}" for f in ("width", "depth", "num_params", "num_steps", "batch_size")),
        *_FREE_ON_RESUME,
    ):
        configs.require(config, field, lambda value: value >= 1, "at least 1")
    rate = "flow.learning_rate"
    configs.require(config, rate, lambda value: 0 < value < math.inf, "above 0 and finite")
    configs.require(config, "flow.ema_decay", lambda v: 0 <= v < 1, "0 or above, below 1")


def check_name(name: str) -> None:
    """Raises UserError unless there is such a sampler."""
    if name not in samplers.names():
        raise UserError(f"--sampler={name} must be one of {', '.join(samplers.names())}")


def make(config: ml_collections.ConfigDict, name: str, shape: Shape) -> samplers.Sampler:
    """The sampler `name`, which is fitted, for latents of this shape.

    Raises:
        UserError: there is no such sampler, or a setting does not fit the latents.
    """
    check_name(name)
    if name == "kronecker":
        return samplers.Kronecker(shape)
    try:
        samplers.check_latents(name, shape)
    except ValueError as error:
        raise UserError(f"--sampler={error}") from None
    if name == "gaussian":
        return samplers.Gaussian(shape)
    if name == "mixture":
        return samplers.Mixture(shape, seed=config.seed, **config.mixture)
    fields = {k: v for k, v in config.flow.items() if f"flow.{k}" not in _FREE_ON_RESUME}
    try:
        flow = samplers.Flow(shape, seed=config.seed, **fields)
        _ = flow.network  # raises where it cannot be built
    except ValueError as error:
        raise UserError(f"flow.{error}") from None
    return flow


def identity(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
    """The fields, flat, on which the fit of the sampler `name` depends."""
    return {
        field: value
        for field, value in configs.flatten(config.to_dict()).items()
        if field.rpartition(".")[0] in ("", name) and field not in _FREE_ON_RESUME
    }
