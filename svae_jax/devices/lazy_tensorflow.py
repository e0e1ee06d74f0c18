"""TensorFlow, imported on first use: its import takes seconds.

It only reads and prepares data sets of TFDS.
"""

import contextlib
import os
from typing import Any

from svae_jax import files


def tensorflow() -> Any:
    """The TensorFlow module, kept silent at start-up and off the GPUs."""
    # Both silence messages, and only if set before the import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if not files.has_home():
        os.environ.setdefault("KERAS_HOME", os.devnull)  # where its settings cannot be written
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # TensorFlow's devices are in use already
        tf.config.set_visible_devices([], "GPU")
    return tf
