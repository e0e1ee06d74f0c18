"""Parses the flags of a command that takes a configuration; a mistake is told in one line."""

import difflib
import os
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from svae_jax.errors import UserError


def parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Parses a command line.

    Args:
        values: the flags, which receive their values; `config` is one of them.
        argv: the program's name and its arguments.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a configuration file that
            does not exist or fails, or an argument that is no flag.
    """
    try:
        rest = values(argv)
    except flags.Error as error:
        # A config file's own error is the last line of a traceback.
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.rpartition("UserError: ")[2]) from None
    except AttributeError:  # an override of a field that does not exist
        raise UserError(_unknown_field(argv)) from None
    except OSError as error:  # an override of a configuration that does not exist
        raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from None
    path = config_flags.get_config_filename(values["config"]).partition(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: there is no such file")
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: options begin with --; see --help")


def _unknown_field(argv: Sequence[str]) -> str:
    from svae_jax import config

    known = list(config.flatten(config.base().to_dict()))
    given = [arg.lstrip("-").removeprefix("config.") for arg in argv if "-config." in arg]
    fields = [field.partition("=")[0] for field in given]
    unknown = next((field for field in fields if field not in known), "")
    nearest = difflib.get_close_matches(unknown, known) or known
    return f"--config.{unknown}: there is no such field; did you mean {' or '.join(nearest)}?"
