"""The command lines of the experiments; they take configurations as `svae_jax.main` does."""

import os
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from svae_jax import command_line
from svae_jax.devices import runtime
from svae_jax.errors import UserError


def parse(
    argv: Sequence[str], doc: str, default_config: str, **lists: tuple[str, Sequence[str]]
) -> flags.FlagValues:
    """Parses --config, --json, --seconds, and options that list words, separated by commas.

    Args:
        argv: the program's name and its arguments.
        doc: what --help prints above the options.
        default_config: the configuration if none is given.
        **lists: the default of each list, and the words that it may contain.

    Raises:
        UserError: a mistake in the arguments.
    """
    if not any(re.match("--?config(=|$)", argument) for argument in argv):
        argv = [argv[0], f"--config={default_config}", *argv[1:]]
    values = flags.FlagValues()
    told = f"fields are set by --config.FIELD=VALUE (default: {default_config})"
    config_flags.DEFINE_config_file(
        "config", help_string=told, flag_values=values, sys_argv=list(argv)
    )
    flags.DEFINE_float("seconds", 20.0, "for each measurement", 1e-3, flag_values=values)
    flags.DEFINE_string("json", None, "file to write the results to", values)
    flags.register_validator("json", _has_directory, "there is no such directory", values)
    for name, (default, words) in lists.items():
        flags.DEFINE_list(name, default, f"of {','.join(words)}", values)
        message = f"must be of {','.join(words)}"
        flags.register_validator(name, frozenset(words).issuperset, message, values)
    if "--help" in argv:
        print(f"{doc}\n{values.get_help()}")
        sys.exit()
    command_line.parse(values, argv)
    return values


def _has_directory(path: str | None) -> bool:
    return path is None or os.path.isdir(os.path.dirname(os.path.abspath(path)))


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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
