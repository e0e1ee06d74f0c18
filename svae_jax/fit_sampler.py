"""Fits a sampler: a distribution of latents from which a trained model makes images.

    python -m svae_jax.fit_sampler --workdir=runs/shapes --sampler=flow

fits to the posteriors of the training images under the newest checkpoint of the run. Samplers are

    gaussian     the aggregate posterior's mean and full covariance; seconds
    kronecker    its mean, and a covariance of rows ⊗ columns ⊗ maps; seconds
    mixture      a mixture of Gaussians over principal components; a minute
    flow         flow matching with a small transformer; minutes
    latent_flow  the same to z ~ q(z|x), with a density for `evaluate`

The fields of the configuration can be given on the command line, as in

    --config.flow.num_steps=4000 --config.mixture.components=20 --config.seed=1

They and their defaults are listed in svae_jax/sampler_config.py. The sampler is saved under
samplers/ in the workdir, which may be in use: the checkpoint is only read. The same command goes on
where a fit was interrupted, and returns at once where it is finished. A run that has trained on
needs its samplers fitted anew, which the same command does.
"""

import json
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from svae_jax import command_line, sampler_config
from svae_jax import config as configs

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "gaussian, kronecker, mixture, flow or latent_flow", required=True
)
_DATA_DIR = command_line.define_data_dir()


def main(argv: Sequence[str]) -> None:
    """Fits the sampler, and prints what it is."""
    del argv
    from svae_jax.analysis import fitting

    given = (_WORKDIR.value, _SAMPLER.value, flags.FLAGS.config)
    print(json.dumps(fitting.fit(*given, data_dir=_DATA_DIR.value), indent=2))


def _define_config() -> None:
    meaning = "settings of the fits, such as --config.flow.num_steps=4000"
    config_flags.DEFINE_config_dict("config", sampler_config.base(), meaning)


def _fields() -> list[str]:
    return list(configs.flatten(sampler_config.base().to_dict()))


if __name__ == "__main__":
    # A flow has many small arrays, for which threads would wait for each other.
    command_line.run(main, _fields, _define_config, keep_memory=False)
