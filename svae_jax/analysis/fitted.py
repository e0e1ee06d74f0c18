"""Fitted samplers in a workdir: where they stand, which model they are of, and how to load one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from svae_jax import sampler_config, samplers
from svae_jax.analysis.trained import Trained
from svae_jax.devices import runtime
from svae_jax.devices.batches import Batch
from svae_jax.errors import UserError
from svae_jax.run import checkpoint


class Fitted(NamedTuple):
    """A sampler with its arrays; call it to draw latents.

    Attributes:
        name: one of `samplers.names()`.
        sampler: its static settings.
        params: its arrays.
    """

    name: str
    sampler: samplers.Sampler
    params: PyTree

    @runtime.own_numerics()
    def __call__(
        self, key: PRNGKeyArray, count: int, first: int = 0
    ) -> Float[Array, "{count} h w n"]:
        """Draws latents; see `samplers.draw`."""
        return samplers.draw(self.sampler, self.params, key, count, first)

    def batches(self, key: PRNGKeyArray, count: int, size: int) -> Iterator[Batch]:
        """Draws latents in batches of a size, which stay on the devices."""
        return samplers.draw_batches(self.sampler, self.params, key, count, size=size)


def place(directory: str | Path, name: str) -> Path:
    """The directory of a sampler within a workdir."""
    return Path(directory) / "samplers" / name


def is_fitted(directory: str | Path, name: str) -> bool:
    """Whether a workdir holds a sampler, of whatever checkpoint; the prior needs no fit."""
    return name == "prior" or (place(directory, name) / "checkpoints").is_dir()


def command(directory: str | Path, name: str) -> str:
    """The command that fits a sampler."""
    return f"python -m svae_jax.fit_sampler --workdir={directory} --sampler={name}"


def version(sampler: samplers.Sampler) -> int:
    """What the parameters of a sampler mean; fits of another version are made anew."""
    return getattr(sampler, "version", 1)


def model_identity(trained: Trained) -> dict[str, Any]:
    """Which model a sampler is of: the step, and a hash of all its variables."""
    return {"step": trained.step, "fingerprint": checkpoint.fingerprint(trained.variables)}


@runtime.own_numerics()
def load_sampler(directory: str | Path, name: str, trained: Trained, **options: Any) -> Fitted:
    """Loads a sampler of a run, verified, and of the very model that it is to be used with.

    Args:
        directory: the workdir.
        name: one of `samplers.names()`.
        trained: the model, from `trained.load`.
        **options: attributes of the sampler that do not change the fit, its `options`:
            `temperature` of `prior`, `noise` of `mixture` and `flow`, `ode_steps` of both flows,
            `density_steps` of `latent_flow`.

    Raises:
        UserError: there is no such sampler or option, it is not fitted, or to another model; the
            message gives the command that fits it.
    """
    if name == "prior":
        prior = samplers.Prior(trained.model.prior)
        params = trained.variables["params"].get("prior", {})
        return Fitted(name, _with(prior, name, options), params)
    sampler_config.check_name(name)
    folder = place(directory, name) / "checkpoints"
    if not is_fitted(directory, name):
        raise UserError(f"{directory}: the sampler {name} is not fitted; {_cure(directory, name)}")
    try:
        loaded = checkpoint.load(folder)
    except checkpoint.NoneIntactError as error:
        raise UserError(
            f"{error}; or delete {folder.parent}, and {_cure(directory, name)}"
        ) from None
    if "params" not in loaded.state:
        raise UserError(
            f"{directory}: the fit of the sampler {name} stopped at step {loaded.step}; to finish "
            f"it: {command(directory, name)}"
        )
    if loaded.config["model"] != model_identity(trained):
        raise UserError(
            f"{directory}: the sampler {name} is fitted to another checkpoint (step "
            f"{loaded.config['model']['step']}) than the one loaded (step {trained.step}); "
            f"{_cure(directory, name)}"
        )
    config = sampler_config.base()
    config.update_from_flattened_dict(loaded.config["settings"])
    sampler = sampler_config.make(config, name, trained.model.posterior.shape)
    if loaded.config.get("version", 1) != version(sampler):
        raise UserError(
            f"{directory}: the sampler {name} was fitted by another version of svae_jax; delete "
            f"{folder.parent}, and {_cure(directory, name)}"
        )
    return Fitted(name, _with(sampler, name, options), loaded.state["params"])


def _cure(directory: str | Path, name: str) -> str:
    return f"to fit it: {command(directory, name)}"


def _with(sampler: Any, name: str, options: dict[str, Any]) -> samplers.Sampler:
    """The sampler with options for drawing."""
    known = sampler.options
    if unknown := sorted(set(options) - set(known)):
        allowed = ", ".join(known) or "none"
        raise UserError(f"the sampler {name} has no option {unknown[0]}; its options: {allowed}")
    try:
        return dataclasses.replace(sampler, **options)
    except ValueError as error:
        raise UserError(f"the sampler {name}: {error}") from None
