"""What the commands of the experiments share."""

import importlib

import pytest
from absl import flags

from experiments import options
from tests.command_line import ROOT

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").rglob("*.py")
    if "    options.run_command(" in path.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_says_what_each_flag_is(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(["--help"])
    assert end.value.code in (None, 0)
    shown = capsys.readouterr().out
    assert f"python -m {name.removesuffix('.__main__')}" in shown
    assert "None" not in shown  # such as a default
    # Ours are called by what they mean.
    assert "updates" not in shown.replace("(1,600 updates, as the authors count it)", "")


def _parsed(*argv, separator=","):
    values = flags.FlagValues()
    options.define_list("words", ["a"], "of a list", values, separator=separator)
    values(["", *argv])
    return values.words


def test_a_list_is_a_flag_that_repeats():
    assert _parsed() == ["a"]
    assert _parsed("--words=") == []
    assert _parsed("--words=b", "--words=c,d") == ["b", "c", "d"]
    given = ("--words=mvn", "--words=lowrank,rank=2 vector")
    assert _parsed(*given, separator=" ") == ["mvn", "lowrank,rank=2", "vector"]
