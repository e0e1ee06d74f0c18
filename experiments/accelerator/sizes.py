"""What is measured: the configurations, and how much of each."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from configs import celeba, cifar10

Row = dict[str, Any]  # of a table: values by column

_CONFIGS = {"CelebA": celeba.get_config, "CIFAR-10": cifar10.get_config}
DATA = tuple(_CONFIGS)
# Real images of this height and width are trained on with this data set's networks.
BY_SHAPE = {(64, 64, 3): "CelebA", (32, 32, 3): "CIFAR-10"}
# Trained on real images; a new model is one more name, which `_CONFIGS` know.
MODELS = ("best", "mvn", "lowrank", "vector")

_THINNER = 16  # with tiny networks, the features of every layer are divided by this
_PARITY_MAPS = 18  # for which a vector's decoder of so few features reaches parity


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        tiny: whether networks are too small to say anything.
        num_images: random images that speed is measured on.
        array: images of the memory part's array.
        batch: images of a training step.
        batches: larger batches, of which the fastest is found.
        generated: images generated at a time.
        matrix: side of the matrices that the device's speed is measured with.
        steps: training steps of a profile, and of the timing of each posterior.
        seconds: time of one measurement.
        epochs: after which real images are evaluated; training ends with the last.
        flow: settings of a flow, as `sampler_config.base` names them.
        num_samples: images drawn from each sampler, and samples of an importance-weighted bound.
        trials: numbers of processes that share the device.
        compiled: whether PyTorch is also timed with torch.compile.
    """

    tiny: bool = False
    num_images: int = 50_000
    array: int = 162_770
    batch: int = 100
    batches: tuple[int, ...] = (1000, 3000, 10_000)
    generated: int = 10_000
    matrix: int = 8192
    steps: int = 200
    seconds: float = 3.0
    epochs: tuple[int, ...] = (1, 10, 30, 100)
    flow: Mapping[str, int] = {"num_steps": 20_000}
    num_samples: tuple[int, int] = (2000, 10)
    trials: tuple[int, ...] = (1, 2, 4, 8)
    compiled: bool = True


FULL = Sizes()
TINY = Sizes(
    tiny=True,
    num_images=200,
    array=200,
    batch=10,
    batches=(20,),
    generated=20,
    matrix=64,
    steps=2,
    seconds=0.05,
    epochs=(1, 2),
    flow={"num_steps": 4, "width": 8, "depth": 1, "num_params": 5000},
    num_samples=(20, 2),
    trials=(1, 2),
    compiled=False,
)


class Context(NamedTuple):
    """What a part of the measurements is given.

    Attributes:
        sizes: how much is measured.
        images: files of packed real images; none where there are none.
        out: the directory of the results.
        scratch: a directory for workdirs, which is deleted at the end.
        results: the rows of earlier parts, by the parts' names.
    """

    sizes: Sizes
    images: tuple[Path, ...]
    out: Path
    scratch: Path
    results: Mapping[str, list[Row]]


def configuration(
    sizes: Sizes, data: str, model: str, *, batch: int = 0, dtype: str = "float32"
) -> ml_collections.ConfigDict:
    """The configuration of a model of one of `DATA`, for so many images a step."""
    config = _CONFIGS[data](model)
    config.batch_size = batch or sizes.batch
    config.model.dtype = dtype
    if sizes.tiny:
        for part in ("encoder", "decoder"):
            config.model[part] = re.sub(r"/(\d+)", _thinner, config.model[part])
        config.latent.maps = -(-config.latent.maps // _THINNER)
        config.model.parity_maps = config.model.parity_maps and _PARITY_MAPS
    return config


def _thinner(width: re.Match[str]) -> str:
    return f"/{max(2, int(width[1]) // _THINNER)}"
