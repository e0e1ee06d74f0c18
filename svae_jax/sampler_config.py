"""The settings of the samplers' fits: their fields, checks, and the samplers built from them."""

import dataclasses
from typing import Any

import ml_collections

from svae_jax import config as configs
from svae_jax import samplers, seeds
from svae_jax.errors import UserError

Shape = tuple[int, int, int]

# Where a long fit reports and saves; the result does not depend on it.
_FREE_ON_RESUME = {"log_every": 50, "checkpoint_every": 500}


def base() -> ml_collections.ConfigDict:
    """All fields with their defaults; each section is of the sampler of its name."""
    sections = {name: _defaults(row) for name, row in samplers.TABLE.items() if name != "prior"}
    return ml_collections.ConfigDict({"seed": 0, **{k: v for k, v in sections.items() if v}})


def _defaults(row: Any) -> dict[str, Any]:
    """The settings of a sampler, and for one of many steps where it reports and saves."""
    apart = ("shape", "seed", *row.options)
    found = {f.name: f.default for f in dataclasses.fields(row) if f.init and f.name not in apart}
    return found | (_FREE_ON_RESUME if "num_steps" in found else {})


def check(config: ml_collections.ConfigDict, name: str) -> None:
    """Validates every field for the fit of the sampler `name`.

    Raises:
        UserError: naming the first field that is wrong, its value and what is allowed; or a field
            that was changed and is of another sampler.
    """
    configs.check_fields(config, base())
    for field, default in configs.flatten(base().to_dict()).items():
        value = configs.get_field(config, field)
        section, _, last = field.rpartition(".")
        if section not in ("", name) and value != default:
            raise UserError(
                f"{field}={value!r} is a setting of --sampler={section}, not of --sampler={name}"
            )
        if last in _FREE_ON_RESUME:
            configs.require(config, field, lambda value: value >= 1, "at least 1")
    seeds.check(config.seed)
    _build(config, name, (1, 1, 1))


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
    sampler = _build(config, name, shape)
    try:
        sampler.check_shape()
    except ValueError as error:
        raise UserError(f"{name}.{error}") from None
    return sampler


def _build(config: ml_collections.ConfigDict, name: str, shape: Shape) -> samplers.Sampler:
    row: Any = samplers.TABLE[name]
    section = config.get(name, {})
    fields = {field: value for field, value in section.items() if field not in _FREE_ON_RESUME}
    has_seed = any(field.name == "seed" for field in dataclasses.fields(row))
    seed = {"seed": config.seed} if has_seed else {}
    try:
        return row(shape, **seed, **fields)
    except ValueError as error:
        raise UserError(f"{name}.{error}") from None


def every(config: ml_collections.ConfigDict, name: str, num_steps: int) -> tuple[int, int]:
    """After how many steps a fit reports, and after how many it saves."""
    section = config.get(name, {})
    return section.get("log_every", num_steps), section.get("checkpoint_every", num_steps)


def identity(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
    """The fields, flat, on which the fit of the sampler `name` depends."""
    found = {}
    for field, value in configs.flatten(config.to_dict()).items():
        section, _, last = field.rpartition(".")
        if section in ("", name) and last not in _FREE_ON_RESUME:
            found[field] = value
    return found
