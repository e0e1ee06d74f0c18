"""What cannot be shown is dropped, and the work goes on."""

import io
import os
import subprocess
import sys

import pytest

from svae_jax import terminal
from svae_jax.run.progress import Progress
from tests import command_line


def shell(line, *args, **environment):
    """Runs a line of a shell, in which "$@" stands for the command."""
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, *args],
        cwd=command_line.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


class Gone(io.StringIO):
    """A stream whose other end has closed."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [Gone(), None])
def test_a_stream_that_takes_nothing_ends_nothing(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    terminal.say("a line")
    with Progress(4, 2) as progress:
        progress.train(1, {"loss": 1.0})
        progress.evaluation(2, {"elbo": 1.0})


def test_a_letter_that_the_stream_does_not_know_is_written_otherwise():
    raw = io.BytesIO()
    stream = terminal.Stream(io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    print("1 ± 2", file=stream, flush=True)
    assert raw.getvalue() == b"1 \\xb1 2\n"


@pytest.mark.parametrize(
    "line",
    ['("$@"; echo $? >"$CODE") 2>&1 | head -1', '"$@" 2>&- >&-; echo $? >"$CODE"'],
    ids=["head", "closed"],
)
def test_a_run_whose_output_goes_nowhere_is_finished_and_saved(tiny_config, tmp_path, line):
    args = command_line.arguments(tiny_config, tmp_path / "run", log_every=1)
    done = shell(line, "-m", "svae_jax.main", *args, CODE=str(tmp_path / "code"))
    assert (tmp_path / "code").read_text() == "0\n", done
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "result.json").exists()
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) > 1


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path):
    code = (
        "from svae_jax import terminal; terminal.protect(); import os, sys\n"
        f"file = open({str(tmp_path / 'precious')!r}, 'w'); os.write(2, b'noise')\n"
        "print('lost'); print('lost', file=sys.stderr); file.write('data'); file.close()"
    )
    assert shell('"$@" 2>&- >&-', "-c", code).returncode == 0
    assert (tmp_path / "precious").read_text() == "data"
