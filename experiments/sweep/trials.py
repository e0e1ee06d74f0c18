"""Makes the trials of a sweep from the overrides that it yields, and checks each."""

import hashlib
import itertools
import json
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import ml_collections

from experiments.sweep.trial import POSTERIOR, Overrides, Trial
from svae_jax import command_line, files
from svae_jax import config as configs
from svae_jax.errors import UserError
from svae_jax.run import workdir as workdirs

_PREFIX = "sweep_"  # of the functions beside `get_config`
_MOST = 10_000  # trials; a generator that never ends passes it


def load(config: str, name: str) -> list[Overrides]:
    """What the function `sweep_<name>` of a configuration's file yields.

    Raises:
        UserError: there is no such file or function (the message lists those there are), or it
            fails, or yields nothing or something else than dictionaries of plain values.
    """
    command_line.load_config(config)  # whose errors are one line
    file = config.partition(":")[0]
    module = runpy.run_path(file)
    if (generate := module.get(_PREFIX + name)) is None:
        known = [key.removeprefix(_PREFIX) for key in module if key.startswith(_PREFIX)]
        raise UserError(f"--sweep={name}: {file} has {', '.join(known) or 'no sweep'}")
    try:
        found = list(itertools.islice(generate(), _MOST + 1))
    except Exception as error:
        raise UserError(f"--sweep={name} fails: {type(error).__name__}: {error}") from error
    if not 1 <= len(found) <= _MOST:
        count = f"more than {_MOST:,} trials" if found else "nothing"
        raise UserError(f"--sweep={name} yields {count}")
    for overrides in found:
        values = overrides.values() if isinstance(overrides, Mapping) else [None]
        if not all(isinstance(value, bool | int | float | str) for value in values):
            raise UserError(f"--sweep={name} must yield {{field: plain value}}, got {overrides!r}")
    return found


def make(
    config: str,
    sweep: Iterable[Overrides],
    workdir: Path,
    common: Overrides = MappingProxyType({}),
    *,
    num_devices: int = 1,
) -> list[Trial]:
    """Makes the trials of a sweep, and checks the configuration of each.

    Args:
        config: a file, with or without a posterior: configs/cifar10.py:lowrank.
        sweep: the overrides of each trial.
        workdir: the sweep's directory, which will hold those of the trials.
        common: the fields of all trials, such as {"num_steps": 100}.
        num_devices: of each trial.

    Raises:
        UserError: an unknown field, a value that is not allowed, a field that is set both for all
            trials and by one, or two trials with the same configuration.
    """
    trials: dict[str, Trial] = {}
    file, _, default = config.partition(":")
    for overrides in sweep:
        if both := common.keys() & overrides.keys():
            field = min(both)
            raise UserError(f"--config.{field}={common[field]}: the sweep sets {field} itself")
        fields = {POSTERIOR: default, **common, **overrides}
        posterior = fields.pop(POSTERIOR)
        path = f"{file}:{posterior}" if posterior else file
        arguments = [f"--config.{field}={value}" for field, value in fields.items()]
        words = _words(overrides)
        try:
            resolved, _ = command_line.load_config(path, arguments)
            configs.check(resolved, num_devices=num_devices)
        except UserError as error:
            raise UserError(f"trial {words}: {error}") from None
        digest = _digest(resolved)
        if digest in trials:
            same = _words(trials[digest].overrides)
            raise UserError(f"trials {same} and {words} have the same configuration")
        name = re.sub(r"[^\w.=+-]+", "_", words)[:100] + f"_{digest}"
        command = (f"--config={path}", *arguments)
        trials[digest] = Trial(name, dict(overrides), command, workdir / name)
    return list(trials.values())


def claim(workdir: Path, sweep: str, config: str, trials: Sequence[Trial]) -> None:
    """Writes `sweep.json`, by which the directory belongs to this sweep and `read` finds it.

    A sweep may gain and lose trials; it is the same one while its name and a trial are the same.

    Raises:
        UserError: the directory belongs to another sweep or to a run, or cannot be written.
    """
    workdirs.create(workdir)
    if workdirs.has_begun(workdir):
        raise UserError(f"--workdir={workdir} holds a run; choose another one for the sweep")
    path = workdir / "sweep.json"
    if (earlier := files.read_json(path)) is not None:
        known = {trial["name"] for trial in earlier["trials"]}
        if earlier["sweep"] != sweep or known.isdisjoint(trial.name for trial in trials):
            raise UserError(
                f"--workdir={workdir} belongs to another sweep: {earlier['sweep']} of "
                f"{earlier['config']}, such as {min(known)}; choose another --workdir"
            )
    listed = [{"name": t.name, "overrides": t.overrides, "arguments": t.arguments} for t in trials]
    files.write_json(path, {"sweep": sweep, "config": config, "trials": listed})


def read(workdir: Path) -> tuple[str, list[Trial]]:
    """A sweep's title and its trials, from its directory.

    Raises:
        UserError: the directory holds no sweep.
    """
    content = files.read_json(workdir / "sweep.json")
    if content is None:
        raise UserError(f"--workdir={workdir} holds no sweep: there is no sweep.json")
    trials = [
        Trial(t["name"], t["overrides"], tuple(t["arguments"]), workdir / t["name"])
        for t in content["trials"]
    ]
    return f"{content['sweep']} of {content['config']}", trials


def _words(overrides: Overrides) -> str:
    """Such as lowrank,rank=2 seed=1."""
    return " ".join(
        str(value) if field == POSTERIOR else f"{field.rpartition('.')[2]}={value}"
        for field, value in overrides.items()
    )


def _digest(config: ml_collections.ConfigDict) -> str:
    """A hash of the fields on which result.json depends."""
    fields = configs.identity(config)
    fields |= {name: config[name] for name in ("num_steps", "num_epochs", "importance_samples")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
