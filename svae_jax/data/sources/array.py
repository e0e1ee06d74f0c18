"""Arrays in .npy and .npz files as a data set: mapped into memory, never unpickled."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from svae_jax import files
from svae_jax.data import images
from svae_jax.errors import UserError

_SUFFIXES = (".npy", ".npz")
# What readers raise on files that are cut short, changed, or no arrays.
_DAMAGES = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
# Of a member's own header in a zip file: its length, and where those of name and extra stand.
_ZIP_HEADER, _ZIP_LENGTHS = 30, slice(26, 30)


class Array:
    """A .npy file, a .npz file, or a directory of .npy files, of images ``[N, H, W, C]``.

    The names of the arrays of a .npz file, or of the files of a directory, are the splits; a single
    .npy file has the split `all`. Only arrays that are compressed or not in C order are copied.

    Raises:
        UserError: there is no such file, it is damaged or holds pickled objects, or its arrays are
            no images of one shape.
    """

    def __init__(self, data_dir: str, cache_dir: Path):
        del cache_dir  # the files are read where they are
        path = Path(data_dir).expanduser()
        self.title = f"array {path}"
        if not is_array(data_dir):
            raise UserError(
                f"dataset.data_dir={data_dir!r}: dataset.name=array reads a .npy file, a .npz file "
                "or a directory of .npy files"
            )
        try:
            self.arrays: Mapping[str, np.ndarray] = images.from_python(dict(_read_all(path)))
        except UserError as error:
            raise UserError(f"dataset.data_dir={data_dir!r}: {error}") from None

    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        _, *shape = next(iter(self.arrays.values())).shape
        return shape[0], shape[1], shape[2]


def is_array(data_dir: str) -> bool:
    """Whether there is a file or a directory that `Array` reads."""
    path = Path(data_dir).expanduser()
    if not data_dir or not path.is_dir():
        return path.suffix.lower() in _SUFFIXES and path.is_file()
    return any(path.glob("*.npy"))


def _read_all(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays by the names of their splits."""
    if path.is_dir():
        for file in sorted(path.glob("*.npy")):
            yield file.stem, _read(file)
    elif path.suffix.lower() == ".npy":
        yield "all", _read(path)
    else:
        yield from _read_members(path)


def _read(path: Path, offset: int = 0) -> np.ndarray:
    """Maps the .npy file that begins at this byte of a file."""
    with _errors_for_user(path), open(path, "rb") as file:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled Python objects, which are never loaded")
        return np.memmap(
            path, dtype, "r", file.tell(), shape=shape, order="F" if is_fortran else "C"
        )


def _read_members(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with _errors_for_user(path), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type == zipfile.ZIP_STORED:
                with open(path, "rb") as file:
                    file.seek(member.header_offset)
                    header = file.read(_ZIP_HEADER)
                lengths = np.frombuffer(header[_ZIP_LENGTHS], "<u2")
                yield name, _read(path, member.header_offset + _ZIP_HEADER + int(lengths.sum()))
            else:
                with archive.open(member) as content:
                    yield name, np.lib.format.read_array(content, allow_pickle=False)


@contextlib.contextmanager
def _errors_for_user(path: Path) -> Iterator[None]:
    """Re-raises what a damaged file leads to as a UserError."""
    try:
        yield
    except UserError:  # of a member of the file
        raise
    except MemoryError:
        raise UserError(
            f"{path.name} is compressed and does not fit into memory; save it with np.save or "
            "np.savez, which can be mapped"
        ) from None
    except _DAMAGES as error:
        raise UserError(
            f"{path.name} cannot be read ({files.reason(error)}); save it again, as numbers, with "
            "np.save or np.savez"
        ) from None
