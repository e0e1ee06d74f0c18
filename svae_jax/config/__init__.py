"""Configurations: their fields and defaults, their checks, and what is built from them.

A file in `configs/` starts from `base`, and `latent_from_arg` reads what follows its colon, as in
`configs/cifar10.py:lowrank,rank=2`. `check` validates all fields before anything compiles.
"""

from svae_jax.config.build import check, likelihood, model, num_steps, recipe
from svae_jax.config.fields import (
    base,
    check_fields,
    check_type,
    flatten,
    get_field,
    latent_from_arg,
    require,
)
from svae_jax.config.resuming import (
    check_continues,
    check_duration,
    continued,
    from_dict,
    identity,
    migrated,
)

__all__ = [
    "base",
    "check",
    "check_continues",
    "check_duration",
    "check_fields",
    "check_type",
    "continued",
    "flatten",
    "from_dict",
    "get_field",
    "identity",
    "latent_from_arg",
    "likelihood",
    "migrated",
    "model",
    "num_steps",
    "recipe",
    "require",
]
