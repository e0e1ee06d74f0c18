"""What the commands share: a user's mistake is one line, and exit codes say how a command ended."""

import difflib
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from absl import app, flags, logging

from svae_jax.errors import UserError
from svae_jax.run import interrupt


def run(
    main: Callable[[Sequence[str]], None],
    fields: Callable[[], Collection[str]],
    define_flags: Callable[[], object] = lambda: None,
) -> None:
    """Parses the flags and runs a command.

    Exit codes: 2 after a user's mistake, which is one line on stderr; 143 and 130 after SIGTERM and
    Ctrl-C.

    Args:
        main: the command; it is given what is left of the arguments, the program's name first.
        fields: gives the dotted names of all fields that `--config.FIELD=VALUE` can set.
        define_flags: defines flags that look at the command line at once, as those of
            `config_flags.DEFINE_config_dict` do.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)

    def guarded(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(
                    f"unexpected argument {argv[1]!r}: options begin with --; see --help"
                )
            main(argv)
        except UserError as error:
            _exit(str(error))
        except KeyboardInterrupt:  # before the first step: nothing was to be saved
            print("interrupted; the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except interrupt.Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_code)

    app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, fields, define_flags))


def _parse_flags(
    argv: list[str], fields: Callable[[], Collection[str]], define_flags: Callable[[], object]
) -> list[str]:
    """Parses the flags, and tells a mistake in them in one line."""
    try:
        define_flags()
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A config file's own error is the last line of a traceback.
        line = str(error).strip().splitlines()[-1]
        _exit(line.rpartition("UserError: ")[2])
    except AttributeError:  # an override of a field that does not exist
        _exit(_unknown_field(argv, fields()))
    except OSError as error:  # an override of a configuration that does not exist
        _exit(f"--config: {str(error).splitlines()[-1].strip()}")


def _unknown_field(argv: Sequence[str], known: Collection[str]) -> str:
    given = [arg.lstrip("-").removeprefix("config.") for arg in argv if "-config." in arg]
    names = [field.partition("=")[0] for field in given]
    unknown = next((field for field in names if field not in known), "")
    nearest = difflib.get_close_matches(unknown, known) or known
    return f"--config.{unknown}: there is no such field; did you mean {' or '.join(nearest)}?"


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
