"""Going on with an earlier run: what may change, and what older versions wrote."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from svae_jax.config.build import DURATION, num_steps
from svae_jax.config.fields import base, flatten, get_field
from svae_jax.errors import UserError

# Fields that may change on resume, because they do not change the results.
_FREE_ON_RESUME = (
    "log_every",
    "eval_every",
    "sample_every",
    "importance_samples",
    "checkpoint.every",
    "checkpoint.keep",
    "dataset.data_dir",
    "dataset.cache_dir",
    "dataset.resident_share",
)
# What runs had that are older than these fields, where that is not today's default.
_BEFORE = {"latent.nu_scale": 0.1, "latent.lower_scale": 1.0}


def from_dict(fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The inverse of `ConfigDict.to_dict`; missing fields are as in runs that are older than them.

    Fields of older versions are migrated.

    Raises:
        UserError: for fields that do not exist, or values of another type.
    """
    config = base()
    config.update_from_flattened_dict(_BEFORE)
    fields = migrated(fields)
    unknown = set(flatten(fields)) - set(flatten(config.to_dict()))
    if unknown:
        raise UserError(
            f"config.json has unknown fields: {', '.join(sorted(unknown))}; a newer version of "
            "svae_jax may have written it: use that one"
        )
    try:
        config.update(fields)
    except TypeError as error:
        raise UserError(f"config.json: {error}") from None
    return config


def migrated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, nested, with those of older versions under today's names."""
    dataset = fields.get("dataset")
    if not isinstance(dataset, Mapping) or "image_size" not in dataset:
        return dict(fields)
    side = dataset["image_size"]  # images were square
    others = {name: value for name, value in dataset.items() if name != "image_size"}
    return {**fields, "dataset": {**others, "height": side, "width": side}}


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields, flat, that a resumed run may not change."""
    fields = flatten(config.to_dict())
    free = (*_FREE_ON_RESUME, *DURATION)
    return {name: value for name, value in fields.items() if name not in free}


def continued(
    config: ml_collections.ConfigDict, earlier: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """The configuration for going on with an earlier run, which may be older than some fields.

    Those are as in the earlier run, unless the configuration sets them.
    """
    copy, defaults = ml_collections.ConfigDict(config.to_dict()), base()
    for field, before in _BEFORE.items():
        is_default = get_field(copy, field) == get_field(defaults, field)
        if is_default and get_field(earlier, field) == before:
            copy.update_from_flattened_dict({field: before})
    return copy


def check_continues(config: ml_collections.ConfigDict, earlier: ml_collections.ConfigDict) -> None:
    """Checks that a resumed run has the configuration of the earlier one, where it matters.

    `check_duration` checks the number of steps.

    Raises:
        UserError: naming every field that differs and may not.
    """
    ours, theirs = flatten(config.to_dict()), flatten(earlier.to_dict())
    changed = [
        f"{name}={ours[name]!r} (was {theirs[name]!r})"
        for name in ours
        if ours[name] != theirs[name] and name not in (*_FREE_ON_RESUME, *DURATION)
    ]
    _refuse_changes(changed)


def check_duration(
    config: ml_collections.ConfigDict, earlier: ml_collections.ConfigDict, num_images: int
) -> None:
    """Checks that a run is not shortened, nor lengthened if its schedule depends on the length.

    Raises:
        UserError: naming num_steps, now and before.
    """
    now, before = num_steps(config, num_images), num_steps(earlier, num_images)
    schedule = config.optimizer.schedule
    if now < before:
        _refuse_changes([f"num_steps={now} (was {before}; it may only grow)"])
    if now > before and schedule != "constant":
        _refuse_changes(
            [f"num_steps={now} (was {before}; optimizer.schedule={schedule!r} depends on it)"]
        )


def _refuse_changes(changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"the workdir belongs to another configuration: {'; '.join(changed)}. "
            "Choose another --workdir, or the earlier values"
        )
