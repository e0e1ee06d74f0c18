"""The command lines of the experiments; they take configurations as `svae_jax.main` does."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments.benchmark.stopwatch import say
from svae_jax import command_line
from svae_jax.devices import runtime
from svae_jax.errors import UserError


def parse(argv: Sequence[str], doc: str, **lists: tuple[str, Sequence[str]]) -> flags.FlagValues:
    """Parses --config, --json, --seconds, and `lists`: their defaults and the words they may hold.

    Raises:
        UserError: a mistake in the arguments.
    """
    if not any(re.match("--?config(=|$)", argument) for argument in argv):
        argv = [argv[0], "--config=configs/celeba.py:lowrank", *argv[1:]]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        help_string="configs/celeba.py:lowrank if none is given; --config.FIELD=VALUE sets a field",
        flag_values=values,
        sys_argv=list(argv),
    )
    flags.DEFINE_float("seconds", 20.0, "time of each measurement", 1e-3, flag_values=values)
    flags.DEFINE_string("json", None, "file for the results", values)
    has_directory = lambda path: path is None or Path(path).absolute().parent.is_dir()  # noqa: E731
    flags.register_validator("json", has_directory, "there is no such directory", values)
    for name, (default, words) in lists.items():
        told = f"of {', '.join(words)}"
        flags.DEFINE_list(name, default, told, values)
        flags.register_validator(name, set(words).issuperset, f"must be {told}", values)
    if "--help" in argv:
        print(f"{doc}\n{values.get_help()}")
        sys.exit()
    command_line.parse(values, argv)
    return values


def variant(values: flags.FlagValues, argument: str) -> ml_collections.ConfigDict:
    """The configuration of the same file and overrides, with `argument` after the colon."""
    flag = values["config"]
    path = config_flags.get_config_filename(flag).partition(":")[0]
    config = config_flags.ConfigFileFlagParser("config").parse(f"{path}:{argument}")
    config.update_from_flattened_dict(config_flags.get_override_values(flag))
    return config


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs an experiment; a user's mistake becomes one line and exit code 2."""
    # A GPU's memory is shared with PyTorch, and with processes that are measured.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.keep_freed_memory()  # as `svae_jax.main` does
    try:
        main(sys.argv)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
