"""A configuration that trains in seconds."""

import hashlib

from svae_jax import config as configs

# A configuration's file for `str.format`; `num_steps` is the number of training steps.
FILE = """
from svae_jax import config as configs


def get_config(arg="lowrank"):
    config = configs.base()
    config.dataset.update(name="folder", data_dir={images!r}, height=8, width=8, channels=3)
    config.dataset.cache_dir = {cache!r}
    config.model.update(encoder="3x3/4/s2 3x3/8/s2", decoder="3x3/6 3x3/4 3x3/image")
    configs.latent_from_arg(config, arg, d=3, N=4, C=8)
    config.update(batch_size=12, num_steps={num_steps}, log_every=10)
    config.update(eval_every=20, sample_every={num_steps})
    config.checkpoint.every = 5
    return config
"""


def pictures(images, split):
    """The files of a split, in the order in which a run has them."""

    def by_hash(path):
        return hashlib.sha256(path.relative_to(images).as_posix().encode()).digest()

    return sorted((images / split).iterdir(), key=by_hash)


def config(images, cache_dir):
    """Trains on a folder of 8×8 pictures with the splits train and test."""
    config = configs.base()
    config.dataset.update(name="folder", data_dir=str(images), height=8, width=8, channels=3)
    config.dataset.cache_dir = str(cache_dir)
    config.latent.update(name="lowrank", height=3, width=3, maps=4, rank=1)
    config.model.update(encoder="3x3/4/s2 3x3/8/s2", decoder="3x3/6 3x3/4 3x3/image")
    config.optimizer.learning_rate = 1e-3
    config.update(batch_size=12, num_steps=8, log_every=2, eval_every=4, sample_every=4)
    config.checkpoint.every = 2
    return config
