"""Configurations: their fields and defaults, their checks, and what is built from them.

A file in `configs/` starts from `base`, and `latent_from_arg` reads what follows its colon, as in
`configs/cifar10.py:lowrank,rank=2`. `check` validates all fields before anything compiles.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
import optax
from flax import traverse_util

from svae_jax import data as data_sets
from svae_jax import latents, likelihoods, seeds, sizes
from svae_jax import model as models
from svae_jax.data.record import Record
from svae_jax.errors import UserError
from svae_jax.model import linear, objective
from svae_jax.model.layers import Style
from svae_jax.recipe import Recipe

# Fields that may change on resume, because they do not change the numbers.
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
_DURATION = ("num_steps", "num_epochs")

# What runs had that are older than these fields, where that is not today's default.
_BEFORE = {"latent.nu_scale": 0.1, "latent.lower_scale": 1.0}

_INTEGERS = 2**31  # JAX has integers of 32 bits

_SCHEDULES = ("constant", "cosine")


def base() -> ml_collections.ConfigDict:
    """All fields with their defaults; a config file sets data, latent, stacks and duration."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "dataset": {
                "name": "shapes",  # shapes, folder, array, files (either), or any image set of TFDS
                "data_dir": "",  # where the data are; empty: TFDS's default
                "cache_dir": "",  # decoded arrays; empty: svae_jax in the user's cache directory
                "height": 0,  # of the images; 0: that of the data, where they have one
                "width": 0,
                "channels": 0,  # of pictures 1 (grey) or 3 (colour); 0: as height
                "split": "train",
                "eval_split": "test",
                # "LOW,HIGH", the values that the model sees as -1 and 1; empty: all that uint8
                # holds, and else the smallest and largest value of the training split.
                "value_range": "",
                "flip": False,  # flips training images left to right at random
                # Images live on the device if they fill at most this share of its memory;
                # otherwise they are streamed from the host.
                "resident_share": 0.25,
            },
            "latent": {
                "name": "lowrank",
                "height": 3,
                "width": 3,
                "maps": 128,
                "rank": 1,
                # Pixels along a side of a latent cell, from which height and width follow: those of
                # the image over it, rounded up. 0: they are given.
                "cell": 0,
                "prior": "standard",  # standard, tensor_normal, matrix_normal, autoregressive
                # How fast training moves ν of low-rank means, and the entries below the diagonals
                # of full covariances' factors, relative to all else that an encoder emits.
                "nu_scale": 0.001,
                "lower_scale": 0.1,
            },
            "model": {
                # Stacks of layers, such as "5x5/32/s2 5x5/64/s2" and "3x3/64 3x3/32 5x5/image", as
                # configs/README.md explains; auto: from the sizes.
                "encoder": "",
                "decoder": "",
                # The encoder's last layer: dense, or convolutional, whose size does not grow with
                # the latent; auto: convolutional from 64 pixels or 16 latent cells a side on.
                "head": "dense",
                "parity_maps": 0,  # vector only: N of the spatial model whose decoder it matches
                # The linear path beside the networks: none, random, or pca, which starts the model
                # at probabilistic PCA. With "none" for both stacks, the path is all there is.
                "linear": "none",
                "norm": "batch",  # batch, group, none
                "activation": "elu",
                "dtype": "float32",  # of the computation; parameters and losses stay float32
                # auto: gradients written for speed on a CPU; lax: XLA's own, which forward-mode
                # differentiation (jax.jvp, jacfwd, hessian) of encoder and decoder needs.
                "convolutions": "auto",
            },
            "objective": {
                "likelihood": "gaussian",  # see `svae_jax.likelihoods`
                "sigma": "optimal",  # its scale: optimal, learned, or a number as text
                "beta": 1.0,
                "beta_warmup_steps": 0,
                "free_bits": 0.0,  # nats a map
                "scaling": "elbo",  # elbo, released_code
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "constant",  # constant, cosine
                "warmup_steps": 0,
                "clip_norm": 0.0,  # of the whole gradient; 0: off
                "ema_decay": 0.0,  # average of the weights for evaluation; 0: off
                # How many non-finite steps in a row are skipped before the run stops.
                "max_bad_steps": 0,
            },
            "batch_size": 100,
            "num_steps": 0,  # training steps since step 0; wins over num_epochs where above 0
            "num_epochs": 0.0,
            "log_every": 50,
            "eval_every": 1000,
            "sample_every": 1000,
            "importance_samples": 0,  # K of the bound in the final evaluation; 0: off
            "checkpoint": {"every": 1000, "keep": 3},
        }
    )


def latent_from_arg(
    config: ml_collections.ConfigDict, arg: str, *, others: Iterable[str] = (), **defaults: int
) -> None:
    """Sets `latent` and `model.parity_maps` from the text after a config file's colon.

    The text is a posterior's name and typed options: `d` (height and width) or `k` (pixels along a
    side of a cell), `N` (maps) and `rank`; for `vector` they are `C` (its length) and `N` (the
    maps of the spatial model whose decoder it matches in parameters).

    Args:
        config: changed in place.
        arg: such as "lowrank,rank=2,d=3".
        others: what else the file takes in place of a posterior; an error lists them.
        **defaults: d or k, N and C.

    Raises:
        UserError: an unknown name or key (the message lists the known ones), or a value that is
            not an integer.
    """
    name, *pairs = (part.strip() for part in arg.split(","))
    if name not in latents.names():
        known = ", ".join([*latents.names(), *others])
        raise UserError(f"no posterior {name!r}: it must be one of {known}")
    is_vector = latents.is_vector(name)
    side = "k" if "k" in defaults else "d"
    keys = (
        ("C", "N") if is_vector else (side, "N", "rank") if latents.has_rank(name) else (side, "N")
    )
    options = {"rank": 1, **defaults}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in keys:
            raise UserError(f"no option {key!r} for {name}: it must be one of {', '.join(keys)}")
        try:
            options[key] = int(value)
        except ValueError:
            raise UserError(f"option {key} of {name} must be an integer, got {value!r}") from None
    size, maps = (1, options["C"]) if is_vector else (options.get("d", 0), options["N"])
    config.latent.update(name=name, height=size, width=size, maps=maps, rank=options["rank"])
    config.latent.cell = 0 if is_vector else options.get("k", 0)
    config.model.parity_maps = options["N"] if is_vector else 0


def check(
    config: ml_collections.ConfigDict,
    *,
    num_devices: int = 1,
    own: models.SpatialVAE | None = None,
) -> None:
    """Validates every field, for a run on `num_devices` devices, of a model of the user's own.

    Raises:
        UserError: naming the first field that is wrong, its value and what is allowed.
    """
    check_fields(config, base())
    for field in ("batch_size", "log_every", "eval_every", "sample_every", "checkpoint.every"):
        require(config, field, lambda value: value >= 1, "at least 1")
    multiple = _multiples(config.batch_size, num_devices)
    require(config, "batch_size", lambda value: value % num_devices == 0, multiple)
    require(config, "checkpoint.keep", lambda value: value >= 1, "at least 1")
    seeds.check(config.seed)
    require(config, "dataset.name", lambda value: value != "", "the name of a data set")
    for field in ("dataset.height", "dataset.width"):
        require(config, field, lambda value: value >= 1, "at least 1")
    require(config, "latent.cell", lambda value: value >= 0, "0 (off) or above")
    name = config.dataset.name
    if name == data_sets.ARRAYS or data_sets.has_any_channels(name):
        require(config, "dataset.channels", lambda value: value >= 1, "at least 1")
    else:
        require(config, "dataset.channels", lambda value: value in (1, 3), "1 (grey) or 3 (colour)")
    require(config, "dataset.resident_share", lambda value: 0 <= value <= 1, "between 0 and 1")
    require(config, "importance_samples", lambda value: value >= 0, "0 (off) or above")
    optimizer = "optimizer."
    # Below the upper limit no update of Adam overflows float32, so updates need no check.
    limits = "above 0 and at most 1e30"
    require(config, optimizer + "learning_rate", lambda v: 0 < v <= 1e30, limits)
    schedules = f"one of {', '.join(_SCHEDULES)}"
    require(config, optimizer + "schedule", lambda value: value in _SCHEDULES, schedules)
    require(config, optimizer + "warmup_steps", lambda value: value >= 0, "0 (off) or above")
    require(config, optimizer + "clip_norm", lambda v: 0 <= v < math.inf, "0 (off) or above")
    require(config, optimizer + "ema_decay", lambda v: 0 <= v < 1, "0 (off) or above, below 1")
    require(config, optimizer + "max_bad_steps", lambda value: value >= 0, "0 or above")
    for field in _DURATION:
        require(config, field, lambda value: 0 <= value < math.inf, "0 or above")
    is_closed_form = config.model.decoder == models.NONE and config.model.linear == "pca"
    if config.num_steps == 0 and config.num_epochs == 0 and not is_closed_form:
        raise UserError("num_steps=0 and num_epochs=0: one of them must be above 0")
    _objective(config, model(config, own=own))


def _multiples(batch_size: int, num_devices: int) -> str:
    """Which sizes of a batch go with these devices, and how many devices with this size."""
    below = batch_size - batch_size % num_devices
    sizes_near = " or ".join(str(size) for size in (below, below + num_devices) if size)
    few = max(n for n in range(1, num_devices + 1) if batch_size % n == 0)
    return (
        f"a multiple of the {num_devices} devices, such as {sizes_near} (a run that has begun goes "
        f"on with {few} of them, as CUDA_VISIBLE_DEVICES chooses)"
    )


def check_fields(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> None:
    """Checks that a configuration has the fields of another one, of the same types.

    Raises:
        UserError: naming the fields that are unknown or missing, or the first of another type.
    """
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"a configuration is a ConfigDict, as of config.base(), got {config!r:.80}")
    found, known = (flatten(fields.to_dict()) for fields in (config, defaults))
    if unknown := found.keys() - known.keys():
        raise UserError(f"there is no field {', '.join(sorted(unknown))}")
    if missing := [field for field in known if field not in found]:
        raise UserError(
            f"config.{missing[0].rpartition('.')[0]} lacks {', '.join(missing)}: set single "
            f"fields, such as --config.{missing[0]}=VALUE"
        )
    for field, value in known.items():
        check_type(field, found[field], type(value))


def check_type(field: str, value: Any, kind: type) -> None:
    """Raises UserError unless the value is of this type; an integer may stand for a float.

    Integers are between -2^31 and 2^31, as JAX's are, but for seeds, which `seeds.check` checks.
    """
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{field} must be of type {kind.__name__}, got {value!r}")
    if isinstance(value, int) and field != "seed" and abs(value) >= _INTEGERS:
        raise UserError(f"{field} must be between -2^31 and 2^31, got {value}")


def require(
    config: ml_collections.ConfigDict, field: str, holds: Callable[[Any], bool], allowed: str
) -> None:
    """Raises UserError, naming what is allowed, unless the field's value holds."""
    if not holds(value := get_field(config, field)):
        raise UserError(f"{field} must be {allowed}, got {value!r}")


def get_field(config: ml_collections.ConfigDict, field: str) -> Any:
    """The value of a field with a dotted name."""
    for part in field.split("."):
        config = config[part]
    return config


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    return traverse_util.flatten_dict(nested, sep=".")


def model(
    config: ml_collections.ConfigDict,
    record: Record | None = None,
    own: models.SpatialVAE | None = None,
) -> models.SpatialVAE:
    """The model that a configuration describes.

    Args:
        config: the configuration.
        record: of the images; None where they are not known yet, or of an older version's run.
        own: the user's, taken in place of what `latent` and `model` describe; only its likelihood
            is that of the configuration.

    Raises:
        UserError: naming the field that is wrong.
    """
    p_x = likelihood(config, record)
    if own is not None:
        _check_own(config, own, p_x)
        return own.clone(likelihood=p_x)
    config, section = sizes.resolved(config), "latent"
    try:
        fields = dict(config.latent)
        prior_name, _ = fields.pop("prior"), fields.pop("cell")
        has_path = config.model.linear != "none"
        posterior = latents.make(**fields, nu_start="cosine" if has_path else "random")
        for side, pixels in zip(("height", "width"), p_x.image_shape, strict=False):
            if fields[side] > pixels:
                raise ValueError(
                    f"{side} must be from 1 to {pixels}, the pixels of an image, got {fields[side]}"
                )
        if config.model.linear not in linear.INITS:
            section = "model"
            known = ", ".join(linear.INITS)
            raise ValueError(f"linear must be one of {known}, got {config.model.linear!r}")
        size = {side: fields[side] for side in ("height", "width", "maps")}
        prior = latents.make_prior(prior_name, **size)
        section = "model"
        return models.make(
            posterior,
            p_x,
            prior=prior,
            encoder=config.model.encoder,
            decoder=config.model.decoder,
            style=Style(**{name: config.model[name] for name in Style.__dataclass_fields__}),
            head=config.model.head,
            parity_maps=config.model.parity_maps,
            has_linear_path=has_path,
        )
    except ValueError as error:
        raise UserError(f"{section}.{error}") from None


def _check_own(
    config: ml_collections.ConfigDict, own: models.SpatialVAE, p_x: likelihoods.Likelihood
) -> None:
    """Checks that a model of the user's own has what `model.linear` needs."""
    start = config.model.linear
    if start == "none":
        return
    if own.linear is None:
        raise UserError(
            f"model.linear={start!r}: this model of your own has no linear path; "
            "give it one, SpatialVAE(..., linear=LinearPath(...))"
        )
    try:
        models.check_takes_path(p_x)
        if start == "pca":
            models.check_can_start_at_pca(own)
    except ValueError as error:
        raise UserError(f"model.{error}") from None


def likelihood(config: ml_collections.ConfigDict, record: Record | None) -> likelihoods.Likelihood:
    """The likelihood that a configuration describes; for the arguments see `model`.

    Raises:
        UserError: naming the field that is wrong.
    """
    name = config.objective.likelihood
    try:
        return likelihoods.make(
            name,
            image_shape=sizes.image_shape(config),
            pixels=likelihoods.default_pixels(name) if record is None else record.pixels,
            sigma=config.objective.sigma,
            channel_basis=None if record is None else record.channel_basis,
        )
    except ValueError as error:
        text = str(error).replace("image_shape", f"likelihood={name!r}: images", 1)
        raise UserError(f"objective.{text}") from None


def _objective(config: ml_collections.ConfigDict, model: models.SpatialVAE) -> objective.Objective:
    """The objective, checked against the likelihood and the prior that it goes with."""
    fields = dict(config.objective)
    chosen = {name: fields.pop(name) for name in ("likelihood", "sigma")}
    try:
        found = objective.Objective(**fields)
    except ValueError as error:
        raise UserError(f"objective.{error}") from None
    if found.scaling == "released_code":
        for name, only in (("likelihood", "gaussian"), ("sigma", "optimal")):
            if chosen[name] != only:
                raise UserError(
                    f"objective.{name}={chosen[name]} has no place in scaling='released_code', "
                    f"which minimises mean squared error plus mean KL; leave it at {only!r}"
                )
    if model.prior.shapes and (found.scaling == "released_code" or found.free_bits):
        field = "free_bits" if found.free_bits else "scaling"
        raise UserError(
            f"objective.{field}={fields[field]} goes with latent.prior='standard' alone, got "
            f"{model.prior.name!r}"
        )
    return found


def recipe(
    config: ml_collections.ConfigDict, num_steps: int, built: models.SpatialVAE | None = None
) -> Recipe:
    """Builds everything static in training and evaluation.

    Args:
        config: the configuration.
        num_steps: of the whole training; the schedule depends on it.
        built: from `model`; by default that of 8-bit images.

    Raises:
        UserError: naming the field that is wrong.
    """
    built = built or model(config)
    return Recipe(
        model=built,
        objective=_objective(config, built),
        optimizer=_optimizer(config, num_steps),
        ema_decay=config.optimizer.ema_decay,
        max_bad_steps=config.optimizer.max_bad_steps,
        batch_size=config.batch_size,
        flip=config.dataset.flip,
        seed=config.seed,
    )


def _optimizer(config: ml_collections.ConfigDict, num_steps: int) -> optax.GradientTransformation:
    options = config.optimizer
    peak, warmup = options.learning_rate, options.warmup_steps
    if options.schedule == "cosine" and num_steps > 0:  # a closed form has no schedule
        if warmup >= num_steps:
            raise UserError(
                f"optimizer.warmup_steps must be below num_steps={num_steps}, got {warmup}"
            )
        schedule = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else peak, peak, warmup, decay_steps=num_steps
        )
    elif warmup:
        schedule = optax.warmup_constant_schedule(0.0, peak, warmup)
    else:
        schedule = optax.constant_schedule(peak)
    clip = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    return optax.chain(*clip, optax.adam(schedule))


def num_steps(config: ml_collections.ConfigDict, num_images: int) -> int:
    """The number of training steps, for a training split of so many images.

    Raises:
        UserError: where an epoch holds no whole batch, or the duration is below one step.
    """
    steps_per_epoch = num_images // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"batch_size={config.batch_size} is above the {num_images} images of "
            f"dataset.split={config.dataset.split!r}"
        )
    steps = config.num_steps or round(config.num_epochs * steps_per_epoch)
    if steps < 1 and config.num_epochs > 0:
        raise UserError(f"num_epochs={config.num_epochs} is less than one training step")
    if steps >= _INTEGERS:
        raise UserError(f"num_epochs={config.num_epochs} is more than 2^31 training steps")
    return steps


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
    free = (*_FREE_ON_RESUME, *_DURATION)
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
        if ours[name] != theirs[name] and name not in (*_FREE_ON_RESUME, *_DURATION)
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
