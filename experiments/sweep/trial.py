"""A trial: one run of a sweep. Ray's workers import this, so it imports neither JAX nor Flax."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POSTERIOR = "posterior"  # the override that stands for the text after the configuration's colon
SEED = "seed"

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: the overrides and a hash of what decides the trial's numbers.
        overrides: what the sweep sets; dotted fields, and `posterior`.
        arguments: those of `svae_jax.main`, without the workdir.
        workdir: where it runs.
    """

    name: str
    overrides: Overrides
    arguments: tuple[str, ...]
    workdir: Path

    def command(self, python: str = "python") -> list[str]:
        """The ordinary command line."""
        return [python, "-m", "svae_jax.main", *self.arguments, f"--workdir={self.workdir}"]

    def parameters(self) -> dict[str, Any]:
        """The overrides, with a posterior's options apart: posterior=lowrank, rank=2."""
        found = dict(self.overrides)
        if POSTERIOR in found:
            name, *options = str(found.pop(POSTERIOR)).split(",")
            pairs = (option.strip().partition("=") for option in options)
            numbers = {key: int(x) if x.isdecimal() else x for key, _, x in pairs}
            found = {POSTERIOR: name, **numbers, **found}
        return found
