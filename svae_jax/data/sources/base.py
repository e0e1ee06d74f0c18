"""The interface of a data set."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

Range = tuple[str, int, int]  # images `start` to `stop - 1` of a split
Reader = Callable[[], Image.Image]  # opens one image; called on any thread, may raise anything


@runtime_checkable
class ArraySource(Protocol):
    """An opened data set whose images are arrays already, which are used as they are.

    Attributes:
        title: Name and version, or path; for messages.
        arrays: Split -> ``[N, H, W, C]`` of uint8, uint16 or floats, best memory-mapped.
    """

    title: str
    arrays: Mapping[str, np.ndarray]


@runtime_checkable
class Source(Protocol):
    """An opened data set of pictures, which `data.load` decodes, converts, crops and caches.

    Attributes:
        title: Name and version, or directory; part of the cache's key and of messages.
        splits: Number of images of each split.
        crop: Side of the central square to keep, in pixels; None keeps all of the image.
    """

    title: str
    splits: dict[str, int]
    crop: int | None

    def stamps(self, ranges: list[Range]) -> Any:
        """Returns JSON data that change with the files of `ranges`, without reading the images."""

    def images(self, ranges: list[Range]) -> Iterator[tuple[str, Reader]]:
        """Yields a name for messages and a reader for each image of `ranges`, in order."""
