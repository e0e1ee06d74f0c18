"""Sweeps that all configurations share: what the trials of `experiments.sweep` set.

A sweep is a generator of {field: value}. The field `posterior` is the text after the
configuration's colon.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from svae_jax import latents

Sweep = Iterator[dict[str, Any]]


def models() -> Sweep:
    """All posteriors, ranks 1 to 3 of those that have one, three seeds."""
    for name, seed in itertools.product(latents.names(), range(3)):
        for rank in (1, 2, 3) if "lowrank" in name else (None,):
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


def latent_sizes(numbers: Sequence[int]) -> Sweep:
    """The height and width of a map, against these numbers of maps."""
    for size, maps in itertools.product((2, 3, 4, 6, 8), numbers):
        yield {"posterior": f"lowrank,d={size},N={maps}"}
