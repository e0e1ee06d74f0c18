"""What configurations share: the models that they name, and their sweeps.

A sweep is a generator of {field: value}. The field `posterior` is the text after the
configuration's colon.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svae_jax import latents

Sweep = Iterator[dict[str, Any]]

SHORT: dict[str, Any] = {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "cosine"}
LINEAR = {**SHORT, "model.norm": "none", "model.linear": "pca"}


def named(
    decoders: Mapping[int, str], maps: int, best: int = 32, encoder: str = ""
) -> dict[str, tuple[str, dict[str, Any]]]:
    """The models that a configuration names, each with its posterior and the fields that differ.

    Args:
        decoders: as of `choices`; it has those of `maps` and `best`.
        maps: of 8×8 in `plain` and `linear`.
        best: maps of 8×8 in `best`.
        encoder: of `best`, down to 8×8, with a convolutional head; by default the configuration's.
    """
    plain = {**SHORT, "model.norm": "none"}
    noise = {**LINEAR, "objective.likelihood": "gaussian_blocks"}
    rich = {"latent.prior": "autoregressive", "model.decoder": decoders[best]}
    if encoder:
        rich |= {"model.encoder": encoder, "model.head": "convolutional"}
    few, decoder = f"mvn,d=8,N={maps}", {"model.decoder": decoders[maps]}
    fast = {"optimizer.learning_rate": 2e-3}
    return {
        "best": (f"mvn,d=8,N={best}", {**noise, **rich}),
        # A vector has one location: a prior of dependence between locations is none.
        "best_vector": ("vector", {**noise, **fast}),
        "linear": (few, {**LINEAR, **decoder}),
        "mvn_linear": ("mvn", LINEAR),
        "plain": (few, {**plain, **decoder}),
        "plain_vector": ("vector", {**plain, **fast}),
    }


def models() -> Sweep:
    """All posteriors, ranks 1 to 3 of those that have one, three seeds."""
    for name, seed in itertools.product(latents.names(), range(3)):
        for rank in (1, 2, 3) if latents.has_rank(name) else (None,):
            yield {"posterior": f"{name},rank={rank}" if rank else name, "seed": seed}


def learning_rate() -> Sweep:
    """Five learning rates, two seeds."""
    for rate, seed in itertools.product((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), range(2)):
        yield {"optimizer.learning_rate": rate, "seed": seed}


def objective() -> Sweep:
    """One change of the objective at a time, for a vector and for spatial latents."""
    changes = {
        "sigma": ("optimal", "learned", 0.1, 0.2, 0.4),
        "beta": (0.25, 0.5, 2.0, 4.0),
        "free_bits": (0.5, 2.0),
        "scaling": ("released_code",),
    }
    for posterior, field in itertools.product(("vector", "lowrank"), changes):
        for value in changes[field]:
            yield {"posterior": posterior, f"objective.{field}": value}


def latent_sizes(decoders: Mapping[int, str], lengths: Sequence[int]) -> Sweep:
    """`mvn`: the height and width of a map against the number of maps; `vector`: its length.

    Settings with more than 2,048 latents are left out: nearly all of such a model is the last layer
    of its encoder.

    Args:
        decoders: as of `choices`; the first is the configuration's own.
        lengths: C of `vector`, with the first two decoders.
    """
    for maps, decoder in decoders.items():
        for size in (2, 3, 4, 6, 8):
            if size * size * maps <= 2048:
                yield {"posterior": f"mvn,d={size},N={maps}", "model.decoder": decoder, **SHORT}
    for (maps, decoder), length in itertools.product(list(decoders.items())[:2], lengths):
        yield {"posterior": f"vector,C={length},N={maps}", "model.decoder": decoder, **SHORT}


def choices(decoders: Mapping[int, str]) -> Sweep:
    """What matters? `mvn` for short runs with three seeds, then one change at a time.

    Args:
        decoders: numbers of maps, and for each the stack of a decoder that has as many parameters
            as the configuration's own, so that only the latent changes.
    """
    for seed in range(3):
        yield {"posterior": "mvn", **SHORT, "seed": seed}
    for posterior in ("naive", "mvn,d=2", "mvn,d=4", "mvn,d=6", "mvn,d=8"):
        yield {"posterior": posterior, **SHORT}
    for maps, decoder in decoders.items():
        yield {"posterior": f"mvn,N={maps}", "model.decoder": decoder, **SHORT}
    changes = {
        "objective.sigma": ("learned", "0.1", "0.2"),
        "objective.beta": (0.5, 2.0),
        "objective.beta_warmup_steps": (200,),
        "objective.free_bits": (0.5, 2.0),
        "model.norm": ("group", "none"),
        "model.activation": ("relu", "silu", "gelu", "tanh"),
        "optimizer.learning_rate": (3e-4, 2e-3, 4e-3),
        "optimizer.schedule": ("constant",),
        "optimizer.warmup_steps": (60,),
        "optimizer.clip_norm": (1000.0,),
        "optimizer.ema_decay": (0.99,),
    }
    for field, values in changes.items():
        for value in values:
            yield {"posterior": "mvn", **SHORT, field: value}


def refinements(size: int, maps: int, decoder: str) -> Sweep:
    """Three seeds of `mvn` with these maps, then one change at a time.

    Args:
        size: height and width of a map.
        maps: their number.
        decoder: its stack.
    """
    latent = f"d={size},N={maps}"
    base = {"posterior": f"mvn,{latent}", "model.decoder": decoder, **SHORT}
    for seed in range(3):
        yield {**base, "seed": seed}
    for posterior in ("naive", "mvn_full", "lowrank,rank=1", "lowrank,rank=2", "lowrank,rank=3"):
        yield {**base, "posterior": f"{posterior},{latent}"}
    changes = {
        "objective.beta": (0.5, 2.0, 4.0),
        "model.norm": ("none",),
        "optimizer.learning_rate": (5e-4, 2e-3),
    }
    for field, values in changes.items():
        for value in values:
            yield {**base, field: value}


def linear(decoders: Mapping[int, str]) -> Sweep:
    """Maps of `mvn` with a linear path that starts at PCA: sizes, noise and prior.

    Maps of 4×4 and 8×8, as many as give 256 to 3,072 latents; one σ, or one for each direction of a
    2×2 block; the prior N(0, I), or a learned one.

    Args:
        decoders: as of `choices`; the first is the configuration's own.
    """
    noises, priors = ("gaussian", "gaussian_blocks"), ("standard", "autoregressive")
    for size, maps in itertools.product((4, 8), sorted(decoders)):
        if 256 <= size * size * maps <= 3072:
            model = {"posterior": f"mvn,d={size},N={maps}", "model.decoder": decoders[maps]}
            for noise, prior in itertools.product(noises, priors):
                changes = {"objective.likelihood": noise, "latent.prior": prior}
                yield {**model, **LINEAR, **changes}


def candidates(decoders: Mapping[int, str], lengths: Sequence[int] = ()) -> Sweep:
    """Models without norms, each at two learning rates: vectors, and large maps of `mvn`.

    Args:
        decoders: as of `choices`; the first is the configuration's own.
        lengths: C of `vector`, besides the configuration's own.
    """
    vectors = ("vector", *(f"vector,C={length}" for length in lengths))
    models: dict[str, dict[str, Any]] = {posterior: {} for posterior in vectors}
    for size, maps in ((4, 16), (4, 32), (8, 4), (8, 8)):
        models[f"mvn,d={size},N={maps}"] = {"model.decoder": decoders[maps]}
    for (posterior, decoder), rate in itertools.product(models.items(), (1e-3, 2e-3)):
        changes = {"model.norm": "none", "optimizer.learning_rate": rate}
        yield {"posterior": posterior, **decoder, **SHORT, **changes}
