"""Writes many images as they are made: one .npz file, or a folder of PNG files.

These are the forms that torch-fidelity, clean-fid and the evaluator of guided diffusion read. One
batch at a time is in memory.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from svae_jax import files
from svae_jax.errors import UserError

FORMATS = ("npz", "png")

Batches = Iterable[Num[np.ndarray, "_b h w c"]]


def check_target(out: Path, image_format: str) -> None:
    """Checks that nothing would be overwritten, and creates the directories.

    Raises:
        UserError: an unknown format, a file or a folder that is not empty stands at `out`, or it
            cannot be written.
    """
    if image_format not in FORMATS:
        raise UserError(f"--format={image_format!r} must be one of {', '.join(FORMATS)}")
    with files.os_errors_for_user(f"--out={out} cannot be written"):
        if image_format == "npz" and out.suffix != ".npz":
            raise UserError(f"--out={out} must end in .npz for --format=npz")
        if out.is_file() or (image_format == "npz" and out.exists()):
            raise UserError(f"--out={out} exists; remove it, or choose another --out")
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"--out={out} is not empty; empty it, or choose another --out")
        directory = out.parent if image_format == "npz" else out
        directory.mkdir(parents=True, exist_ok=True)


def write(
    out: Path,
    image_format: str,
    shape: tuple[int, int, int, int],
    batches: Batches,
    dtype: str = "uint8",
) -> None:
    """Writes images to `out`, which `check_target` has checked.

    Args:
        out: for "npz" a file, which will hold `arr_0 [n, h, w, c]`, with three equal channels for
            grey ones of uint8, as the evaluator takes no other; for "png" a folder, which will hold
            000000.png and so on.
        image_format: one of `FORMATS`.
        shape: [n, h, w, c] of all images together.
        batches: consecutive parts of them.
        dtype: of the images; uint8 for "png".

    Raises:
        UserError: it cannot be written; an .npz file is then absent.
    """
    with files.os_errors_for_user(f"--out={out} cannot be written"):
        if image_format == "npz":
            _write_npz(out, shape, dtype, batches)
        else:
            _write_pngs(out, batches)


def save_picture(path: Path, picture: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes one picture as PNG, atomically.

    Raises:
        OSError: it cannot be written.
    """
    with files.replacing(path) as file:
        _as_image(picture).save(file, format="png")


def _as_image(picture: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _write_npz(out: Path, shape: tuple[int, ...], dtype: str, batches: Batches) -> None:
    if dtype == "uint8" and shape[-1] == 1:
        shape = (*shape[:-1], 3)
        batches = (np.repeat(batch, 3, axis=-1) for batch in batches)
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    files.check_room(out.parent, math.prod(shape) * np.dtype(dtype).itemsize)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(files.replacing(out))
        archive = stack.enter_context(zipfile.ZipFile(file, "w"))
        array = stack.enter_context(archive.open("arr_0.npy", "w", force_zip64=True))
        np.lib.format.write_array_header_1_0(array, header)
        for batch in batches:
            array.write(np.ascontiguousarray(batch).data)


def _write_pngs(out: Path, batches: Batches) -> None:
    number = 0
    for batch in batches:
        for picture in batch:
            _as_image(picture).save(out / f"{number:06d}.png")
            number += 1
