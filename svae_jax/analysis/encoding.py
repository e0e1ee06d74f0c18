"""Writes the posteriors of a whole split, one batch in memory at a time."""

import functools
import io
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import tqdm
from jaxtyping import Array, Float, Num, PyTree

from svae_jax import files, terminal
from svae_jax import model as models
from svae_jax.analysis import trained
from svae_jax.analysis.trained import Trained
from svae_jax.data import cache
from svae_jax.devices import batches, compiler, runtime
from svae_jax.errors import UserError
from svae_jax.model import SpatialVAE

Pair = tuple[Float[np.ndarray, "_b h w n"], Float[np.ndarray, "_b h w n"]]

_BATCH = 256  # images in memory at a time, or fewer large ones
_SUFFIXES = (".npz", ".npy")


@runtime.own_numerics()
def write(
    directory: str | Path,
    out: str | Path,
    split: str = "",
    *,
    images: Any = None,
    data_dir: str | Path = "",
) -> Path:
    """Writes the posteriors' means and marginal standard deviations of a split, in its order.

    Args:
        directory: the workdir.
        out: a file that does not exist. An .npz file will hold `mean` and `stddev`, float32
            ``[n, h, w, maps]``; an .npy file the means alone.
        split: in TFDS's syntax; empty for the run's `dataset.split`.
        images: the arrays that the run is of, if it is of arrays from Python.
        data_dir: where the run's data set is now, if it has moved.

    Returns:
        The file.

    Raises:
        UserError: a mistake that the user can correct; nothing is overwritten.
    """
    target = files.user_path(out, "--out")
    _check(target, out)
    model = trained.load(directory, images=images, data_dir=data_dir)
    pixels = model.images(split or model.config.dataset.split)
    shape = (len(pixels), *model.model.posterior.shape)
    with (
        files.os_errors_for_user(f"--out={out} cannot be written"),
        files.replacing(target) as file,
    ):
        # An .npz file takes the room of three: the second array waits while it is copied.
        num_arrays = 3 if target.suffix == ".npz" else 1
        files.check_room(target.parent, num_arrays * math.prod(shape) * 4)  # of float32
        if target.suffix == ".npy":
            _write_means(file, shape, _encoded(model, pixels))
        else:
            _write_both(file, shape, _encoded(model, pixels), target.parent)
    return target


def _check(target: Path, out: str | Path) -> None:
    if target.suffix not in _SUFFIXES:
        raise UserError(f"--out={out} must end in {' or '.join(_SUFFIXES)}")
    with files.os_errors_for_user(f"--out={out} cannot be written"):
        if target.exists():
            raise UserError(f"--out={out} exists; remove it, or choose another --out")
        target.parent.mkdir(parents=True, exist_ok=True)


def _encoded(model: Trained, pixels: Num[np.ndarray, "n height width c"]) -> Iterator[Pair]:
    """Yields means and standard deviations of consecutive images."""
    size = batches.size_for(pixels.shape[1:], min(_BATCH, len(pixels)))
    pairs = batches.over(
        lambda batch: _posteriors(model.model, model.variables, batch.rows), pixels, size
    )
    bar = tqdm.tqdm(total=len(pixels), unit=" images", disable=None, file=terminal.stderr())
    with bar:
        for pair in pairs:
            yield pair
            cache.release(pixels)  # otherwise a mapped file would fill the memory
            bar.update(len(pair[0]))


@functools.partial(compiler.jit, static_argnums=0)
def _posteriors(
    model: SpatialVAE, variables: PyTree, pixels: Num[Array, "b height width c"]
) -> tuple[Float[Array, "b h w n"], Float[Array, "b h w n"]]:
    """The means and the standard deviations of a batch."""
    params = models.encode(model, variables, pixels)
    return model.posterior.mean(params), model.posterior.stddev(params)


def _write_means(file: IO[bytes], shape: tuple[int, ...], pairs: Iterator[Pair]) -> None:
    file.write(_header(shape))
    for mean, _ in pairs:
        file.write(_bytes(mean))


def _write_both(
    file: IO[bytes], shape: tuple[int, ...], pairs: Iterator[Pair], directory: Path
) -> None:
    # An archive holds one array after the other: the second one waits on disk.
    with zipfile.ZipFile(file, "w") as archive, tempfile.TemporaryFile(dir=directory) as waiting:
        with archive.open("mean.npy", "w", force_zip64=True) as entry:
            entry.write(_header(shape))
            for mean, stddev in pairs:
                entry.write(_bytes(mean))
                waiting.write(_bytes(stddev))
        waiting.seek(0)
        with archive.open("stddev.npy", "w", force_zip64=True) as entry:
            entry.write(_header(shape))
            shutil.copyfileobj(waiting, entry)


def _header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _bytes(values: Float[np.ndarray, "_b h w n"]) -> memoryview:
    return np.ascontiguousarray(values, np.float32).data
