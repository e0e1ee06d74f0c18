"""`progress`: what a run tells on lines and on a terminal, by a clock that the tests move."""

import io
import os
import pty
import re
import select
import time

import numpy as np
import pytest

from svae_jax import terminal
from svae_jax.run import progress


class Clock:
    """Stands in for the time module, and moves only when told."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines(clock):
    out = io.StringIO()
    with progress.Progress(1500, 100, stream=out) as report:
        report.advance(1)
        clock.now += 60  # compilation
        report.start(1)
        clock.now += 99
        values = {"train/loss": np.float32(1234.5), "train/kl": 56.7, "train/sigma": 0.2}
        assert report.train(100, values) == pytest.approx(100)
        report.evaluation(100, {"eval/elbo": 1069.1, "eval/bits_per_dim": 4.321})
        report.print("a line")
    assert out.getvalue() == (
        "step 100/1500  loss 1234.5  kl 56.7  100 images/s  ETA 23:20\n"
        "step 100  eval: elbo 1069.1  bits/dim 4.321\n"
        "a line\n"
    )


def test_pauses_count_for_the_eta_and_not_for_the_rate(clock):
    out = io.StringIO()
    report = progress.Progress(100, 10, stream=out)
    report.start(10)
    for step in (20, 30):
        clock.now += 5
        with report.paused():
            clock.now += 15
        assert report.train(step, {"loss": 1.0}) == pytest.approx(10 * 10 / 5)
    assert out.getvalue().splitlines()[1].endswith("20 images/s  ETA 2:20")  # 70 steps of 2 s


def test_a_pause_before_the_clock_starts_is_nothing(clock):
    report = progress.Progress(100, 10, stream=io.StringIO())
    with report.paused():
        clock.now += 50
    report.start(1)
    clock.now += 1
    assert report.train(2, {}) == pytest.approx(10)


def test_without_a_start_the_first_interval_is_not_measured(clock):
    out = io.StringIO()
    report = progress.Progress(40, 8, stream=out)
    clock.now += 30
    assert report.train(10, {"loss": 1.0}) is None
    clock.now += 10
    assert report.train(20, {"loss": 1.0}) == pytest.approx(8)
    assert out.getvalue() == (
        "step 10/40  loss 1.000\nstep 20/40  loss 1.000  8 images/s  ETA 0:20\n"
    )


def test_the_eta_of_a_resumed_run_knows_only_its_own_steps(clock):
    out = io.StringIO()
    report = progress.Progress(1000, 1, step=900, stream=out)
    report.start(901)
    clock.now += 9
    report.train(910, {})
    assert out.getvalue() == "step 910/1000  1 images/s  ETA 1:30\n"


def test_a_start_and_a_log_at_one_step_measure_nothing(clock):
    report = progress.Progress(1, 8, stream=io.StringIO())
    report.start(1)
    assert report.train(1, {"loss": 1.0}) is None


def test_disabled_is_silent_and_measures(clock, capfd):
    with progress.Progress(10, 4, enabled=False) as report:
        report.start(1)
        clock.now += 2
        assert report.train(2, {"loss": 1.0}) == pytest.approx(2)
        report.evaluation(2, {"elbo": 1.0})
        report.print("a line")
    assert capfd.readouterr() == ("", "")


def test_lines_go_to_stderr(capfd):
    progress.Progress(10, 4).print("a line")
    assert capfd.readouterr() == ("", "a line\n")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234.5"),
        (-1234.56, "-1234.6"),
        (56.7, "56.7"),
        (4.3214, "4.321"),
        (0.2131, "0.213"),
        (0.01234, "0.0123"),
        (1e-7, "1e-07"),
        (0.0, "0"),
        (np.float32("nan"), "nan"),
        (-np.inf, "-inf"),
    ],
)
def test_numbers_read_well(value, text):
    assert progress._number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (42.0, "0:42"), (725.0, "12:05"), (11045.2, "3:04:05")]
)
def test_durations_read_well(seconds, text):
    assert terminal.duration(seconds) == text


def _screen(text):
    """The lines a terminal shows: what follows a carriage return overwrites."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in re.sub(r"\x1b\[[A-Z]", "", line).split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def _read_all(descriptor):
    chunks = []
    while select.select([descriptor], [], [], 0.3)[0]:
        chunks.append(os.read(descriptor, 65536))
    return b"".join(chunks).decode()


def test_on_a_terminal_a_bar_stays_below_the_lines():
    main, side = pty.openpty()
    try:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        with (
            open(side, "w", closefd=False) as stream,
            progress.Progress(20, 10, step=4, stream=stream) as report,
        ):
            report.start(5)
            time.sleep(0.15)  # tqdm draws at most every tenth of a second
            report.advance(8)
            report.train(10, {"loss": 1234.5, "kl": 56.7})
            report.evaluation(10, {"elbo": 1069.1})
            report.train(20, {"loss": 1.5, "kl": 56.7})
        text = _read_all(main)
    finally:
        os.close(main)
        os.close(side)
    assert " 4/20" in text  # a resumed run begins where it stands
    assert " 8/20" in text
    assert "10/20, loss 1234.5  kl 56.7" in text
    shown = [line for line in _screen(text) if line]
    assert shown[0] == "step 10  eval: elbo 1069.1"
    assert re.fullmatch(
        r"100%\|█+\| 20/20, loss 1\.500  kl 56\.7  [\d,]+ images/s  ETA 0:00", shown[1]
    )
    assert len(shown) == 2
