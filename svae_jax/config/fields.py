"""Fields of a configuration, their defaults and types, and what follows a config file's colon."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
from flax import traverse_util

from svae_jax import latents
from svae_jax.errors import UserError

INTEGERS = 2**31  # JAX has integers of 32 bits


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
                "channels": 0,  # of pictures 1 (grey) or 3 (colour); 0: those of the data
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
                # Multipliers (of the learning rate, under Adam) for ν of low-rank means and for the
                # entries below the diagonals of full covariances' factors.
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
    if isinstance(value, int) and field != "seed" and abs(value) >= INTEGERS:
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
