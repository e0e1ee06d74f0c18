"""Which images a run is of: `data.json` in its workdir. Paths are not recorded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from svae_jax.data import images
from svae_jax.data.images import Description, Pixels
from svae_jax.data.sources import folder
from svae_jax.errors import UserError
from svae_jax.pixels import PixelRange

TRAIN, HELD_OUT = "the training split", "the evaluation split"

Basis = tuple[tuple[float, ...], ...]


class Record(NamedTuple):
    """What a run's images are.

    Attributes:
        train: the training split.
        held_out: the evaluation split.
        value_range: the values that the model sees as -1 and 1.
        is_inferred: whether the range is that of the training images, and not given.
        channel_basis: orthonormal directions of the training pixels' channels, if the likelihood
            has one σ for each (`likelihoods.channel_basis`).
        order: of the pictures of a folder (`sources.folder`).
    """

    train: Description
    held_out: Description
    value_range: tuple[float, float]
    is_inferred: bool = False
    channel_basis: Basis | None = None
    order: str = folder.MIXED

    @property
    def pixels(self) -> PixelRange:
        """What the values of the pixels mean."""
        return PixelRange(self.train.dtype, *self.value_range, self.is_inferred)

    def to_json(self) -> dict[str, Any]:
        """The content of `data.json`."""
        splits = {"train": self.train._asdict(), "held_out": self.held_out._asdict()}
        return {**self._asdict(), **splits}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Record":
        """The inverse of `to_json`, after JSON.

        Raises:
            UserError: the fields are not those of a record.
        """
        try:
            basis = fields["channel_basis"]
            return cls(
                Description.from_json(fields["train"]),
                Description.from_json(fields["held_out"]),
                tuple(fields["value_range"]),
                fields["is_inferred"],
                None if basis is None else tuple(map(tuple, basis)),
                fields.get("order", folder.BY_PATH),  # an older version knew no other
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"data.json is damaged ({error}); use another --workdir") from None


def measure(train: Pixels, held_out: Pixels, value_range: str, cache_dir: Path) -> Record:
    """Measures a run's images, without a channel basis.

    Args:
        train: the training split.
        held_out: the evaluation split.
        value_range: `dataset.value_range`.
        cache_dir: where it is kept what mapped files hold.

    Raises:
        UserError: values that are not finite or all the same, or a range that does not fit.
    """
    of_train = images.describe(train, TRAIN, cache_dir)
    of_held_out = images.describe(held_out, HELD_OUT, cache_dir)
    pixels = images.pixel_range(of_train, value_range)
    return Record(of_train, of_held_out, (pixels.low, pixels.high), pixels.is_inferred)


def check_values(record: Record, train: Pixels, held_out: Pixels, is_strict: bool) -> None:
    """Checks that all values lie in the range; it counts those beyond an inferred range.

    Args:
        record: of these images.
        train: the training split.
        held_out: the evaluation split.
        is_strict: whether values beyond an inferred range are refused too.

    Raises:
        UserError: values beyond the range.
    """
    for array, description, name in (
        (train, record.train, TRAIN),
        (held_out, record.held_out, HELD_OUT),
    ):
        images.check_within(
            array, description, name, record.pixels, is_strict or not record.is_inferred
        )


def check_same(ours: Record, theirs: Record, where: str) -> None:
    """Checks that the images are those of an earlier run.

    Args:
        ours: the images that are given now.
        theirs: those of the run.
        where: the workdir, for the message.

    Raises:
        UserError: naming the splits that differ.
    """
    _refuse_changes(
        where,
        {
            "dataset.split": (ours.train, theirs.train),
            "dataset.eval_split": (ours.held_out, theirs.held_out),
        },
    )


def check_split(
    pixels: Pixels, theirs: Description, split: str, cache_dir: Path, where: str
) -> None:
    """Checks that the images of one split are those of an earlier run.

    Args:
        pixels: the images that are found now.
        theirs: those of the run.
        split: their name.
        cache_dir: as of `measure`.
        where: the workdir, for the message.

    Raises:
        UserError: they are not.
    """
    _refuse_changes(where, {split: (images.describe(pixels, split, cache_dir), theirs)})


def _refuse_changes(where: str, of_splits: Mapping[str, tuple[Description, Description]]) -> None:
    changed = [
        f"{name}: {_text(now)} (was {_text(before)})"
        for name, (now, before) in of_splits.items()
        if now != before
    ]
    if changed:
        raise UserError(
            f"{where}: its run is of other images: {'; '.join(changed)}. Choose another --workdir, "
            "or give the earlier images"
        )


def _text(found: Description) -> str:
    return f"{found.num_images:,} of {found.dtype}{list(found.shape)}, SHA-256 {found.digest[:12]}"
