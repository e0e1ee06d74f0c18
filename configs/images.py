"""Images of one's own: a folder of pictures, a .npy or .npz file, or a folder of .npy files.

    --config=configs/images.py:best --config.dataset.data_dir=PICTURES

Latents, networks and the linear path follow from the images' size; options after the name are `k`,
the pixels along a side of a latent cell, and `N`, the number of maps: `best,k=16,N=16`. Any
posterior stands in the place of `best`, such as `lowrank,rank=2`. Like the `best` of the other
configurations, it has a prior in which each location depends on its neighbours.
"""

import ml_collections

from svae_jax import config as config_lib
from svae_jax import sizes

_BEST = {"best": "mvn"}


def get_config(arg: str = "best") -> ml_collections.ConfigDict:
    """The configuration for `arg`, such as "best,k=8" or "naive,N=16"."""
    config = config_lib.base()
    # The size of arrays, or of the first picture; a tenth is held out.
    config.dataset.update(name="files", split="all[:90%]", eval_split="all[90%:]")
    config.model.update(encoder=sizes.AUTO, decoder=sizes.AUTO, head=sizes.AUTO)
    config.model.update(norm="none", linear="pca")
    config.optimizer.update(learning_rate=1e-3, schedule="cosine")
    config.num_epochs = 20.0
    if arg.partition(",")[0] in _BEST:
        config.latent.prior = "autoregressive"
    name, comma, options = arg.partition(",")
    posterior = f"{_BEST.get(name, name)}{comma}{options}"
    config_lib.latent_from_arg(config, posterior, others=_BEST, k=8, N=8, C=64)
    return config
