"""Where images come from: a folder, a data set of TFDS, or the set that comes with the package."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from PIL import Image

Range = tuple[str, int, int]  # the images of a split from start to stop
Reader = Callable[[], Image.Image]  # decodes one image; may be called on any thread


@runtime_checkable
class Source(Protocol):
    """A data set, opened. All of it may raise UserError.

    Attributes:
        title: Its name and version, or the folder.
        splits: The number of images in each file of each split.
        crop: The side of the central square to keep; None: as large as fits.
    """

    title: str
    splits: dict[str, list[int]]
    crop: int | None

    def stamps(self, ranges: list[Range]) -> Any:
        """What differs when the files differ, as far as that shows without reading them (JSON)."""

    def images(self, ranges: list[Range], channels: int) -> Iterator[Reader]:
        """What decodes each image, in order, to mode `L` (1 channel) or `RGB` (3)."""
