"""What is built from a configuration, once all its fields are checked."""

import math

import ml_collections
import optax

from svae_jax import data as data_sets
from svae_jax import latents, likelihoods, seeds, sizes
from svae_jax import model as models
from svae_jax.config import fields as field_lib
from svae_jax.config.fields import require
from svae_jax.data.record import Record
from svae_jax.errors import UserError
from svae_jax.model import linear, objective
from svae_jax.model.layers import Style
from svae_jax.recipe import Recipe

DURATION = ("num_steps", "num_epochs")
_SCHEDULES = ("constant", "cosine")


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
    field_lib.check_fields(config, field_lib.base())
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
    for field in DURATION:
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
                    f"objective.{name}={chosen[name]} cannot be combined with "
                    "scaling='released_code', which minimises mean squared error plus mean KL; "
                    f"leave it at {only!r}"
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
    if steps >= field_lib.INTEGERS:
        raise UserError(f"num_epochs={config.num_epochs} is more than 2^31 training steps")
    return steps
