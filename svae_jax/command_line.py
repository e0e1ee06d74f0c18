"""What all commands share: mistakes as one line, and exit codes that say how a command ended."""

import contextlib
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from svae_jax import config_files, files, seeds, terminal
from svae_jax.errors import UserError
from svae_jax.run import interrupt

Main = Callable[[Sequence[str]], None]

# The flags that are defined here are those of the command that asks for them, in its --help too.
flags.disclaim_key_flags()

Fields = Callable[[], Collection[str]]  # the dotted names that `--config.NAME=VALUE` can set
Define = Callable[[], object]

# What absl says of each required flag that is not given.
_REQUIRED = re.compile(r"Flag (--\w+) must have a value other than None")

# Commands other than `main` choose the size of their batches themselves.
_MORE_MEMORY = "take a device with more memory (JAX_PLATFORMS=cpu takes the machine's own)"


def define_seed(meaning: str) -> flags.FlagHolder[int]:
    """Defines --seed of a command that draws."""
    return flags.DEFINE_integer("seed", 0, meaning, lower_bound=0, upper_bound=seeds.LARGEST)


def define_data_dir() -> flags.FlagHolder[str]:
    """Defines --data_dir of a command that reads the data set of a run."""
    meaning = "where the data set of the run is now, if it has moved: as dataset.data_dir"
    return flags.DEFINE_string("data_dir", "", meaning)


def training_fields() -> Collection[str]:
    """Returns the fields of a training configuration."""
    from svae_jax import config

    return config.flatten(config.base().to_dict())


def run(
    main: Main,
    fields: Fields = training_fields,
    define: Define = lambda: None,
    *,
    memory_cure: str = _MORE_MEMORY,
    keep_memory: bool = True,
) -> None:
    """Parses the flags and runs a command.

    Exit codes: 0 after --help; 2 after a user's mistake, which is one line on stderr; 143, 130 and
    129 after SIGTERM, Ctrl-C and a closed terminal.

    Args:
        main: the command; its argument is the program's name alone.
        fields: the fields of the command's configuration.
        define: defines flags that read the command line at once, so that their errors are caught.
        memory_cure: what helps where the command takes too much memory.
        keep_memory: whether `runtime.keep_freed_memory`, which pays where arrays are large.
    """
    terminal.protect()
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)

    doc = sys.modules[main.__module__].__doc__

    def parse_flags(argv: Sequence[str]) -> Sequence[str]:
        try:
            guard(lambda: parse(flags.FLAGS, argv, fields, define, doc))
        except SystemExit as end:
            # The flags themselves only end the process after --help, which absl takes for failure.
            sys.exit(0 if end.code == 1 else end.code)
        return argv[:1]

    def prepare_and_run(argv: Sequence[str]) -> None:
        # Imported late, so that --help and a mistyped flag answer at once.
        from svae_jax.devices import runtime

        if keep_memory:
            runtime.keep_freed_memory()
        runtime.leave_out_compilers()
        runtime.shorten_plugin_errors()
        runtime.set_numerics()
        keep_programs()
        main(argv)

    def guarded(argv: Sequence[str]) -> None:
        guard(lambda: prepare_and_run(argv), memory_cure)

    app.run(guarded, flags_parser=parse_flags)


def keep_programs() -> None:
    """Caches compiled programs in the user's cache; without a home each process compiles."""
    from svae_jax.data import cache
    from svae_jax.devices import runtime

    with contextlib.suppress(UserError):
        runtime.keep_compiled_programs(cache.home() / "compiled")


def parse(
    values: flags.FlagValues,
    argv: Sequence[str],
    fields: Fields = training_fields,
    define: Define = lambda: None,
    doc: str | None = None,
) -> None:
    """Parses a command line into `values`; for `fields` and `define` see `run`.

    Args:
        values: the flags.
        argv: the program's name and the arguments.
        fields: the fields of the command's configuration.
        define: defines flags that read the command line at once.
        doc: the command's description, whose first example is shown where a flag is missing.

    Raises:
        UserError: an unknown flag or field, a required flag that is missing, a value of the wrong
            type, a configuration file that does not exist or fails, or an argument that is not a
            flag.
    """
    try:
        define()
        rest = values(_with_config_path(values, argv))
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error, values, fields)) from None
    except flags.Error as error:
        if missing := _REQUIRED.findall(str(error)):
            verb = "is" if len(missing) == 1 else "are"
            raise UserError(f"{' and '.join(missing)} {verb} missing{_as_in(doc)}") from None
        # A config file's own error is the last line of a traceback.
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.rpartition("UserError: ")[2]) from None
    except AttributeError as error:
        raise UserError(_missing(error, argv, fields())) from None
    except OSError as error:  # an override of a configuration that does not exist
        raise UserError(f"--config: {str(error).splitlines()[-1].strip()}") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: options begin with --; see --help")


def paths(values: Sequence[str]) -> list[str]:
    """The paths of a flag that can be repeated; commas part those of one value.

    A value that names something there is taken whole, since names may hold commas.
    """
    return [
        path
        for value in values
        for path in ([value] if os.path.exists(os.path.expanduser(value)) else value.split(","))
    ]


def load_config(
    path: str, arguments: Sequence[str] = ()
) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """Loads a training configuration as `svae_jax.main` does.

    Args:
        path: a file or a name, and what stands behind its colon, such as celeba:lowrank.
        arguments: fields to set, such as --config.batch_size=10.

    Returns:
        The configuration, and the fields that were set, by their dotted names.

    Raises:
        UserError: as `parse` and `check_config_file`.
    """
    values = flags.FlagValues()
    argv = ["", f"--config={path}", *arguments]
    config_flags.DEFINE_config_file("config", None, "", values, sys_argv=argv)
    parse(values, argv)
    check_config_file(values)
    return values.config, config_flags.get_override_values(values["config"])


def check_config_file(values: flags.FlagValues) -> None:
    """Checks that the file of the flag `config` exists and gives a configuration.

    Raises:
        UserError: it does not.
    """
    path = config_flags.get_config_filename(values["config"]).partition(":")[0]
    if not os.path.isfile(path):
        known = ", ".join(config_files.names())
        raise UserError(
            f"--config={path}: there is no such file; those that come with the package go by their "
            f"names: {known}"
        )
    if not isinstance(values.config, ml_collections.ConfigDict):
        kind = type(values.config).__name__
        raise UserError(f"--config={path}: get_config returns a {kind}, not a ConfigDict")


def _with_config_path(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """The command line with the path of a configuration that is given by its name.

    Raises:
        UserError: there are two configurations, none of this name, or one in a directory with a
            colon, where its path would be cut.
    """
    argv = list(argv)
    if "config" not in values or values["config"].default is not None:
        return argv  # there is no file to give: the fields are those of the command
    places = [i for i, arg in enumerate(argv) if arg.partition("=")[0] in ("-config", "--config")]
    if len(places) > 1:
        raise UserError("--config is given twice")
    for i in places:
        _, is_pair, value = argv[i].partition("=")
        if not is_pair and i + 1 == len(argv):
            break  # without a value, which the flags themselves refuse
        path = config_files.resolved(value if is_pair else argv[i + 1])
        if os.path.dirname(path.rpartition(".py")[0]).count(":"):
            raise UserError(
                f"--config={path}: a path is cut at its first colon, where options begin; give one "
                "without a colon in it, such as one relative to its directory"
            )
        argv[i : i + 2 - bool(is_pair)] = [f"--config={path}"]
    return argv


def _as_in(doc: str | None) -> str:
    """The first example of a command's description, to end a message with."""
    examples = [line.strip() for line in (doc or "").splitlines() if line.startswith("    python")]
    return f", as in {examples[0]}" if examples else "; see --help"


def _unknown(error: flags.UnrecognizedFlagError, values: flags.FlagValues, fields: Fields) -> str:
    """What is wrong with a flag that does not exist; it may be a field without `config.`."""
    name = error.flagname
    meant = [f for f in fields() if name in (f, f.rpartition(".")[2])] if "config" in values else []
    if not meant:
        return str(error)
    return f"--{name} is a field of the configuration: --config.{' or --config.'.join(meant)}"


def _missing(error: AttributeError, argv: Sequence[str], known: Collection[str]) -> str:
    """What is missing: a field that is set, or a function of the configuration file."""
    given = [arg.lstrip("-").removeprefix("config.") for arg in argv if "-config." in arg]
    names = [field.partition("=")[0] for field in given]
    unknown = next((field for field in names if field not in known), "")
    if not unknown and error.name == "get_config":
        return f"--config: {error}; a configuration is a Python file with get_config(arg)"
    if not unknown:
        frames = traceback.extract_tb(error.__traceback__)
        # A ConfigDict raises in its own package what is wrong in the file that uses it.
        last = [frame for frame in frames if "ml_collections" not in frame.filename][-1]
        return f"--config: {last.filename}, line {last.lineno}: {files.reason(error)}"
    if unknown == "dataset.image_size":  # of older versions
        return f"--config.{unknown}: give --config.dataset.height and --config.dataset.width"
    nearest = difflib.get_close_matches(unknown, known) or known
    return f"--config.{unknown}: there is no such field; did you mean {' or '.join(nearest)}?"


def guard(action: Callable[[], None], memory_cure: str = _MORE_MEMORY) -> None:
    """Runs an action; ends the process as `ending` says if it is one of those exceptions."""
    try:
        action()
    except BaseException as error:
        if (end := ending(error, memory_cure)) is None:
            raise
        message, code = end
        terminal.say(message)
        sys.exit(code)


def ending(error: BaseException, memory_cure: str = _MORE_MEMORY) -> tuple[str, int] | None:
    """The line and the exit code with which an exception ends a command; None for a bug."""
    match error:
        case UserError():
            # A name may hold a line break; the error is one line.
            return f"error: {error}".replace("\n", "\\n"), 2
        case KeyboardInterrupt():  # before the first step, when there is nothing to save
            return "interrupted; the same command continues", 128 + signal.SIGINT
        case interrupt.Stopped():
            return str(error), error.exit_code
        case RuntimeError() | AssertionError() if reason := _lacks_device(error):
            name = os.environ.get("JAX_PLATFORMS", "")
            return f"error: JAX_PLATFORMS={name}: {reason}; set another, or leave it out", 2
        case MemoryError() | RuntimeError() if _is_out_of_memory(error):
            return f"error: too little memory ({files.reason(error)}); {memory_cure}", 2
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _lacks_device(error: BaseException) -> str:
    """Why JAX finds no device of the platforms that the user names; empty for other errors."""
    if "Unable to initialize backend" in str(error):
        return files.reason(error).partition(" (set JAX_PLATFORMS")[0]
    frames = traceback.extract_tb(error.__traceback__)
    # JAX asserts that a device was found, where the plug-in of the platform has failed before.
    if isinstance(error, AssertionError) and frames and frames[-1].name == "backends":
        return "there is no such device, or JAX cannot use it"
    return ""
