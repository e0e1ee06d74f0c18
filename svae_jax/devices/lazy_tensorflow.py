"""TensorFlow, imported late: it takes seconds, and only reads records and writes summaries."""

import contextlib
import os
from typing import Any


def tensorflow() -> Any:
    """The module, without its start-up messages and without the memory of the GPUs."""
    # Both keep messages from the terminal, and only if set before the import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # someone has used TensorFlow's devices already
        tf.config.set_visible_devices([], "GPU")
    return tf
