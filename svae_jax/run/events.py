"""TensorBoard's event files, written and read without TensorFlow, whose import takes seconds.

A file is a sequence of records: a length (uint64), its checksum (uint32), so many bytes, which are
an event, and their checksum. TensorBoard's own modules make all but the order of these calls; the
classes around them import TensorFlow where it is installed, as does `clu.metric_writers`.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

PATTERN = "events.out.tfevents.*"


class EventWriter:
    """Writes scalars, pictures and a configuration to a new event file of a directory.

    What a call writes is handed to the operating system before it returns.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: the file cannot be written; each call may raise it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Creates the file; its name, which holds the time, is later than that of any before."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer import record_writer

        name = f"{PATTERN[:-1]}{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._event = event_pb2.Event
        self._records = record_writer.RecordWriter((pathlib.Path(directory) / name).open("xb"))
        self._write(file_version="brain.Event:2")

    def scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers, or arrays of one element, by name."""
        from tensorboard.plugins.scalar import summary_v2

        for name, value in scalars.items():
            number = np.asarray(value).reshape(())
            self._write(step=step, summary=summary_v2.scalar_pb(name, number))

    def picture(self, step: int, name: str, size: tuple[int, int], png: bytes) -> None:
        """Writes a PNG file of `size`, which is height and width."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.image import metadata
        from tensorboard.util import tensor_util

        height, width = size
        tensor = tensor_util.make_tensor_proto([str(width).encode(), str(height).encode(), png])
        about = metadata.create_summary_metadata(display_name=None, description=None)
        value = summary_pb2.Summary.Value(tag=name, metadata=about, tensor=tensor)
        self._write(step=step, summary=summary_pb2.Summary(value=[value]))

    def config(self, config: Mapping[str, Any]) -> None:
        """Writes a flat configuration for TensorBoard's HParams tab, at step 0."""
        from tensorboard.plugins.hparams import summary_v2

        kinds = (bool, int, float, str)
        shown = {k: v if isinstance(v, kinds) else str(v) for k, v in config.items()}
        self._write(step=0, summary=summary_v2.hparams_pb(shown))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())
        self._records.flush()  # a killed run loses nothing


def steps(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yields (step, end in bytes) of each whole record of an event file.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    from google.protobuf import message
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    while len(header := file.read(12)) == 12:
        length, checksum = struct.unpack("<QI", header)
        if checksum != masked_crc32c(header[:8]):
            return
        record = file.read(length + 4)
        if len(record) < length + 4:
            return
        try:
            yield event_pb2.Event.FromString(record[:-4]).step, file.tell()
        except message.DecodeError:
            return
