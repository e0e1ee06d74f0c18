"""The parts of the measurements, most valuable first."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.accelerator import device, real, speed
from experiments.accelerator.sizes import MODELS, Context, Row


class Part(NamedTuple):
    """One part.

    Attributes:
        measure: yields rows as they are measured.
        share: of the remaining time, relative to those of the parts that follow.
        needs_images: whether real images are needed.
    """

    measure: Callable[[Context], Iterator[Row]]
    share: float
    needs_images: bool = False


_BEST, *_OTHERS = MODELS

PARTS = {
    "device": Part(device.device, 6),
    "posteriors": Part(device.posteriors, 20),
    "speed": Part(speed.speed, 28),
    "pytorch": Part(speed.pytorch, 35),
    f"train_{_BEST}": Part(functools.partial(real.train, model=_BEST), 20, needs_images=True),
    "samplers": Part(functools.partial(real.samplers, model=_BEST), 12, needs_images=True),
    "flow": Part(functools.partial(real.flow, model=_BEST), 20, needs_images=True),
    **{
        f"train_{name}": Part(functools.partial(real.train, model=name), 12, needs_images=True)
        for name in _OTHERS
    },
    "profile": Part(device.profile, 6),
    "sharing": Part(speed.sharing, 8),
    "memory": Part(device.memory, 8),
}
