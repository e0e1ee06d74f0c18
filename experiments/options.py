"""What the commands of the experiments share: flags of their own, and mistakes as one line."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from svae_jax import command_line, terminal
from svae_jax.errors import UserError


class _PathParser(flags.ArgumentParser):
    """A path on the command line; empty, it would stand for the current directory."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> Path:
        """Returns the path.

        Raises:
            ValueError: it is empty.
        """
        if not argument.strip():
            raise ValueError("it is empty: give a path")
        return Path(argument).expanduser()


def define_path(
    name: str, meaning: str, values: flags.FlagValues, *, required: bool = True
) -> None:
    """Defines a flag whose value is a path."""
    flags.DEFINE(_PathParser(), name, None, meaning, values, flags.ArgumentSerializer())
    if required:
        flags.mark_flag_as_required(name, values)


class _ListFlag(flags.MultiFlag):
    """A flag that can be repeated, whose single values may hold several words."""

    def _parse(self, arguments: Any) -> list[str]:
        return [word for words in super()._parse(arguments) for word in words]


def define_list(
    name: str,
    default: Sequence[str] | None,
    meaning: str,
    values: flags.FlagValues,
    *,
    separator: str = ",",
) -> None:
    """Defines a flag that can be repeated.

    Args:
        name: of the flag.
        default: its words where it is not given.
        meaning: for --help.
        values: the flags of the command.
        separator: what separates several words of one value: a comma, or a blank where words hold
            commas, such as lowrank,rank=2.
    """
    parser = flags.ListParser() if separator == "," else flags.WhitespaceSeparatedListParser()
    flag = _ListFlag(parser, flags.ArgumentSerializer(), name, default, meaning)
    flags.DEFINE_flag(flag, values)


def parse(
    argv: Sequence[str],
    doc: str | None,
    define: Callable[[flags.FlagValues], object] = lambda values: None,
    config: str | None = None,
) -> flags.FlagValues:
    """Parses the flags of a command.

    Args:
        argv: the arguments, without the program's name.
        doc: what --help begins with.
        define: defines the command's own flags.
        config: None if the command has no configuration; else it has --config and the flags of its
            fields, as `svae_jax.main`, and this is the default: a path, or empty.

    Raises:
        UserError: a mistake in the arguments.
    """
    values, argv = flags.FlagValues(), ["", *argv]
    define(values)
    if config is not None:
        if config and not any(re.match("--?config(=|$)", argument) for argument in argv):
            argv.insert(1, f"--config={config}")
        meaning = "configuration, such as cifar10 or FILE.py"
        config_flags.DEFINE_config_file("config", None, meaning, values, sys_argv=argv)
        values["config"].default_as_str = config  # for --help
    if "--help" in argv:
        print(f"{doc}\n{values.get_help()}")
        sys.exit()
    command_line.parse(values, argv, doc=doc)
    if config is not None and values.config is not None:
        command_line.check_config_file(values)
    return values


def config_path(values: flags.FlagValues) -> str:
    """The value of --config: a file, and what stands behind its colon.

    Raises:
        UserError: it was not given.
    """
    if values.config is None:
        raise UserError("--config is needed: a configuration, such as cifar10 or FILE.py")
    return config_flags.get_config_filename(values["config"])


def overrides(values: flags.FlagValues) -> dict[str, Any]:
    """The fields that --config.FIELD=VALUE sets."""
    return config_flags.get_override_values(values["config"])


def load(path: str, fields: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Loads a configuration, such as celeba:lowrank, with some fields changed.

    Raises:
        UserError: as `command_line.load_config`.
    """
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return command_line.load_config(path, arguments)[0]


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command with this process's arguments; exit codes as `command_line.run`."""
    terminal.protect()
    command_line.guard(lambda: sys.exit(main(sys.argv[1:])))
