"""What the commands of the experiments share: options, and mistakes as one line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from svae_jax import command_line, terminal
from svae_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser of `python -m experiments.NAME` whose errors are a UserError.

    Fields of the configuration, --config.FIELD=VALUE, are left to the command: use
    `parse_known_args`.
    """

    def __init__(self, name: str, description: str | None):
        """Takes the NAME, and what --help begins with."""
        super().__init__(
            prog=f"python -m experiments.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises a UserError in place of the usage and an exit."""
        raise UserError(message)


def nonempty_path(text: str) -> Path:
    """A path on the command line; empty, it would stand for the current directory.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(text).expanduser()


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command with this process's arguments; exit codes as `command_line.run`."""
    terminal.protect()
    command_line.guard(lambda: sys.exit(main(sys.argv[1:])))
