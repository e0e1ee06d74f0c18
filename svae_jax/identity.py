"""Which run a workdir holds: its configuration, its images, and the version that wrote it.

Whatever continues or reads a run checks it here, and one line says what differs. Images are the
run's by what they hold, wherever they lie. Another version of the libraries only causes a warning.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from absl import logging

from svae_jax import config as configs
from svae_jax import data, files, sizes
from svae_jax.data import record as records
from svae_jax.data.images import Pixels
from svae_jax.data.record import Record
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.run import checkpoint

Arrays = Mapping[str, Pixels]


class Identity(NamedTuple):
    """What a run is of.

    Attributes:
        config: its configuration; `dataset.data_dir` is where its data were.
        record: what its images are; None for a run of an older version.
    """

    config: ml_collections.ConfigDict
    record: Record | None

    @property
    def order(self) -> str:
        """The order of the pictures of a folder."""
        return data.BY_PATH if self.record is None else self.record.order


def read(directory: Path) -> Identity:
    """Reads the identity of a run; warns if other versions of the libraries wrote it.

    Raises:
        UserError: the directory is not a workdir, or a file in it is damaged.
    """
    config = configuration(directory)
    fields = files.read_json(directory / "data.json")
    _warn_versions(directory)
    return Identity(config, None if fields is None else Record.from_json(fields))


def configuration(directory: Path) -> ml_collections.ConfigDict:
    """The configuration of a run.

    Raises:
        UserError: the directory is not a workdir, or its `config.json` is damaged.
    """
    fields: dict[str, Any] | None = files.read_json(directory / "config.json")
    if fields is None:
        raise UserError(f"{directory} is not the workdir of a run: it holds no config.json")
    return configs.from_dict(fields)


def _warn_versions(directory: Path) -> None:
    now, before = runtime.versions(), checkpoint.versions(directory / "checkpoints")
    other = [name for name in now if before.get(name, now[name]) != now[name]]
    if other:
        wrote, is_now = (", ".join(f"{name} {of[name]}" for name in other) for of in (before, now))
        logging.warning("%s: written by %s; this is %s", directory, wrote, is_now)


def images(
    run: Identity, arrays: Arrays | None, split: str, where: str, data_dir: str = ""
) -> Pixels:
    """A split of a run's images, which are searched where they were, and are never downloaded.

    Args:
        run: the run.
        arrays: those of a run of arrays from Python, which `check_arrays` has checked.
        split: in TFDS's syntax.
        where: the workdir, for messages.
        data_dir: where the data are, if they have moved.

    Raises:
        UserError: the images are not those of the run, are not there, or cannot be read.
    """
    dataset = run.config.dataset.to_dict()
    if arrays is not None:
        return data.load_of(dataset, arrays, split)
    dataset |= _places(dataset, data_dir, where)
    found = data.load_of(dataset, None, split, run.order)
    if run.record is not None:
        own = {dataset["split"]: run.record.train, dataset["eval_split"]: run.record.held_out}
        # Another split has no record; whether the data are the run's, the held-out images tell.
        known = split if split in own else dataset["eval_split"]
        pixels = found if known == split else data.load_of(dataset, None, known, run.order)
        cache_dir = data.cache_directory(dataset["cache_dir"])
        records.check_split(pixels, own[known], known, cache_dir, where)
    return found


def warn_overlap(
    run: Identity, arrays: Arrays | None, split: str, where: str = "", data_dir: str = ""
) -> None:
    """Warns in one line if held-out images are among those that the run was trained on.

    For the arguments see `images`.
    """
    dataset = run.config.dataset.to_dict()
    if arrays is None:
        dataset |= _places(dataset, data_dir, where)
    shared = data.count_shared(dataset, arrays, (dataset["split"], split), run.order)
    if shared:
        logging.warning(
            "%d images of %s are in dataset.split=%r too: results on them are of images that the "
            "model was trained on",
            *(shared, split, dataset["split"]),
        )


def check_arrays(run: Identity, arrays: Arrays) -> None:
    """Checks that arrays from Python are those of the run.

    Raises:
        UserError: they are not.
    """
    dataset = run.config.dataset
    shape = list(sizes.image_shape(run.config))
    for name, array in arrays.items():
        if list(array.shape[1:]) != shape:
            raise UserError(f"images: {name} is of {list(array.shape[1:])}, the run of {shape}")
    train, held_out = (
        data.load_of(dataset.to_dict(), arrays, split)
        for split in (dataset.split, dataset.eval_split)
    )
    if run.record is not None:
        cache_dir = data.cache_directory(dataset.cache_dir)
        found = records.measure(train, held_out, dataset.value_range, cache_dir)
        records.check_same(found, run.record, "images")


def _places(dataset: Mapping[str, Any], data_dir: str, where: str) -> dict[str, str]:
    """Where the data of a run are now, and where they are cached, as fields of `dataset`."""
    name, cache_dir = dataset["name"], dataset["cache_dir"]
    if name == data.ARRAYS:  # they have no place: whoever has them gives them
        return {}
    given = [absolute(data_dir, "--data_dir")] if data_dir else [dataset["data_dir"]]
    if (place := data.locate(name, given)) is None:
        raise UserError(
            f"{where}: its data set {name} is not in {given[0] or 'the directory of TFDS'}; give "
            "its place: --data_dir=DIR, data_dir= in Python"
            + ("" if name == "folder" else ", or the variable TFDS_DATA_DIR")
        )
    # A cache on another machine is no place to write to.
    return {
        "data_dir": place,
        "cache_dir": cache_dir if cache_dir and Path(cache_dir).is_dir() else "",
    }


def absolute(path: str, name: str) -> str:
    """A place as it is stored; TFDS also reads from URLs."""
    return path if not path or "://" in path else str(files.user_path(path, name))


def stored(
    config: ml_collections.ConfigDict, earlier: Identity | None
) -> ml_collections.ConfigDict:
    """The configuration as a run stores it: with absolute places.

    The data of a run that goes on may be where the configuration says, or where they were.
    """
    copy = ml_collections.ConfigDict(config.to_dict())
    dataset = copy.dataset
    for field in ("data_dir", "cache_dir"):
        dataset[field] = absolute(dataset[field], f"--config.dataset.{field}")
    if earlier is not None and dataset.name != data.ARRAYS:
        places = [dataset.data_dir, earlier.config.dataset.data_dir]
        found = data.locate(dataset.name, [place for place in places if place] or [""])
        if found is None and not dataset.data_dir:
            _places(earlier.config.dataset.to_dict(), "", "the run")  # which says that
        dataset.data_dir = dataset.data_dir if found is None else found
    return copy


def keep_places(directory: Path, config: ml_collections.ConfigDict) -> None:
    """Keeps the places of the data in the `config.json` of a finished run, which else stays.

    Raises:
        UserError: it cannot be written.
    """
    path = directory / "config.json"
    fields = files.read_json(path)
    assert fields is not None  # the run is finished
    places = {name: config.dataset[name] for name in ("data_dir", "cache_dir")}
    if not places.items() <= fields["dataset"].items():
        fields["dataset"] |= places
        files.write_json(path, fields)
