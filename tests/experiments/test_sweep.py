"""Sweeps: their trials, engines, reports and mistakes."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.sweep import __main__ as command
from experiments.sweep import engines, results
from experiments.sweep import trial as trial_lib
from experiments.sweep import trials as trials_lib
from experiments.sweep.board import Board
from experiments.sweep.trial import ELBO, FAILED, PRUNED, Options, Outcome, Trial, sign
from svae_jax import command_line
from svae_jax import config as configs
from svae_jax.errors import UserError
from svae_jax.model import stacks
from svae_jax.model.layers import Style
from tests import tiny
from tests.command_line import ROOT

NUM_STEPS = 120

# Tiny trials, of the 48 pictures of `tiny_images`.
CONFIG = (
    tiny.FILE
    + """

def sweep_seeds():
    for seed in range(2):
        yield {{"posterior": "mvn", "seed": seed}}
    yield {{"posterior": "mvn", "batch_size": 60}}  # above the number of images


def sweep_rates():
    for rate in (1e-2, 1e-9):
        yield {{"optimizer.learning_rate": rate}}


def sweep_twins():
    yield {{"seed": 0}}
    yield {{"posterior": "lowrank", "eval_every": 7}}


def sweep_typo():
    yield {{"latent.mapz": 3}}


def sweep_bad_value():
    yield {{"batch_size": -1}}


def sweep_nothing():
    yield from ()


def sweep_lists():
    yield [1]


def sweep_broken():
    yield {{"seed": 1 // 0}}


def sweep_endless():
    while True:
        yield {{"seed": 0}}
"""
)


@pytest.fixture(scope="session")
def config(tmp_path_factory, tiny_images):
    """The path of a configuration's file with sweeps."""
    path = tmp_path_factory.mktemp("sweep") / "tiny_sweeps.py"
    places = {"images": str(tiny_images), "cache": str(path.parent / "cache")}
    path.write_text(CONFIG.format(**places, num_steps=NUM_STEPS))
    return str(path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


ONE_CORE = trial_lib.limits(1, 0)


@pytest.fixture(scope="session")
def alone(config, tmp_path_factory):
    """The two trials of `seeds` that train, run by the printed commands on one core each."""
    workdir = tmp_path_factory.mktemp("alone")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command.main([f"--config={config}", "--sweep=seeds", f"--workdir={workdir}", "--dry_run"])
    commands = [shlex.split(line) for line in printed.getvalue().splitlines()]
    assert [words[0] for words in commands] == ["python"] * 3
    running = [
        subprocess.Popen(
            [sys.executable, *words[1:]],
            cwd=ROOT,
            env=os.environ | ONE_CORE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for words in commands[:2]
    ]
    assert [one.wait(timeout=600) for one in running] == [0, 0]
    return trials_lib.read(workdir)[1][:2]


@pytest.fixture
def sweep():
    """Starts the command in a process of its own, which does not outlive the test."""
    started = []

    def start(*arguments):
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "experiments.sweep", *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def _finish(started):
    stdout, stderr = started.communicate(timeout=600)
    return started.returncode, stdout, stderr


def _wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def _trained_by(trial, *, after=None):
    """The process that trains a trial, once it has saved; another one than `after`."""

    def look():
        owner = trial.workdir / ".lock.owner"
        words = owner.read_text().split() if owner.exists() else []
        pid = int(words[1]) if len(words) > 1 else None
        steps = trial.workdir / "checkpoints"
        return pid if pid != after and steps.is_dir() and any(steps.iterdir()) else None

    return _wait_for(look)


def _parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _metrics(trials):
    return [trial.outcome().metrics for trial in trials]


def _last_steps(trial):
    """How often a trial has trained its last step."""
    log = (trial.workdir / "log.txt").read_text()
    return log.count(f"step {NUM_STEPS}/{NUM_STEPS}")


# ---------------------------------------------------------------------------------- Ray


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_sweep_survives_the_loss_of_a_worker_and_of_its_driver(config, alone, sweep, tmp_path):
    """Each trial ends once, with the numbers of the bare command; one that fails stops no other."""
    pytest.importorskip("ray")
    trials = trials_lib.make(config, trials_lib.load(config, "seeds"), tmp_path)
    arguments = (f"--config={config}", "--sweep=seeds", f"--workdir={tmp_path}", "--cpus=1")
    driver = sweep(*arguments)
    first = _trained_by(trials[0])
    os.kill(_parent(first), signal.SIGKILL)
    _trained_by(trials[0], after=first)
    driver.kill()
    driver.communicate()

    driver = sweep(*arguments)
    _wait_for(lambda: "started" in driver.stderr.readline())
    driver.terminate()
    code, _, stderr = _finish(driver)
    assert code == 143, stderr
    assert "the same command continues" in stderr

    code, stdout, stderr = _finish(sweep(*arguments))
    assert code == 1, stderr
    found = [trial.outcome() for trial in trials]
    assert [outcome.status for outcome in found] == ["done", "done", "failed"]
    assert [outcome.metrics for outcome in found[:2]] == _metrics(alone)
    assert "above the 48 images" in found[2].reason
    assert f"failed: {trials[2].name}: batch_size=60" in stderr
    assert "sweep.csv" in stdout

    assert "Traceback" not in stderr

    # What is done is not done again. (Before, a last step may be trained twice: a kill can come
    # between it and its checkpoint.)
    before = [_last_steps(trial) for trial in trials[:2]]
    assert min(before) >= 1
    written = [(trial.workdir / "result.json").stat().st_mtime_ns for trial in trials[:2]]
    engines.run(trials[:2], tmp_path)  # nothing is left: Ray is not even started
    assert [_last_steps(trial) for trial in trials[:2]] == before
    assert written == [(t.workdir / "result.json").stat().st_mtime_ns for t in trials[:2]]


@pytest.mark.ray
def test_early_stopping_prunes_a_trial_that_does_not_learn(config, sweep, tmp_path):
    pytest.importorskip("ray")
    arguments = (f"--config={config}", "--sweep=rates", f"--workdir={tmp_path}")
    code, _, stderr = _finish(sweep(*arguments, "--cpus=2", "--early_stopping=20"))
    assert code == 0, stderr
    trials = trials_lib.read(tmp_path)[1]
    good, bad = (trial.outcome() for trial in trials)
    assert good.status == "done"
    assert bad.status == "pruned"
    assert bad.step < NUM_STEPS
    assert "step 20" in bad.reason
    assert engines.run(trials, tmp_path) == [good, bad]  # a rerun leaves both alone
    assert "## Pruned" in (tmp_path / "sweep.md").read_text()


def test_a_trial_takes_its_share_of_a_node():
    pytest.importorskip("ray")
    from experiments.sweep.ray_tune import resources

    cpu_only, two, eight = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 32.0, "GPU": 8.0}
    assert resources([cpu_only], None, None) == (4, 0)
    assert resources([two], None, None) == (8, 1)
    assert resources([cpu_only, two, eight], None, None) == (4, 1)
    assert resources([eight], None, 0.25) == (1, 0.25)
    assert resources([two], 3, 2) == (3, 2)
    with pytest.raises(UserError, match=r"--gpus=3: no node has more than 2"):
        resources([cpu_only, two], None, 3)
    with pytest.raises(UserError, match=r"--gpus=1: no node has more than 0"):
        resources([cpu_only], None, 1)
    with pytest.raises(UserError, match=r"--cpus=17: no node with 1 GPUs has more than 16"):
        resources([{"CPU": 64.0}, two], 17, 1)


def test_tune_can_pickle_what_shows_its_state():
    pytest.importorskip("ray")
    from experiments.sweep import ray_tune

    board = Board([], ELBO, Terminal())
    assert pickle.dumps(ray_tune._Watch([], board, lambda: False, Path()))


def test_an_address_where_no_ray_answers_is_told_soon(config, tmp_path):
    pytest.importorskip("ray")
    trials = trials_lib.make(config, [{"seed": 0}], tmp_path)
    options = Options(address="localhost:1")
    with pytest.raises(UserError, match=r"--address=localhost:1: no Ray answers \(Connection ref"):
        engines.run(trials, tmp_path, options)


# ---------------------------------------------------------------------------------- without Ray


@pytest.fixture
def without_extra(monkeypatch):
    """As if Ray were not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)


def test_the_local_engine_needs_no_ray(config, alone, tmp_path, capsys, monkeypatch, without_extra):
    for name, value in ONE_CORE.items():
        monkeypatch.setenv(name, value)
    arguments = [f"--config={config}", "--sweep=seeds", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match=r"pip install -e '.\[sweep\]'.*--engine=local"):
        command.main(arguments)
    shutil.copytree(alone[0].workdir, tmp_path / alone[0].name)  # done by hand
    assert command.main([*arguments, "--dry_run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    assert command.main([*arguments, "--engine=local"]) == 1
    stderr = capsys.readouterr().err
    first, second, third = trials_lib.read(tmp_path)[1]
    assert f"{first.name} started" not in stderr
    assert f"{second.name} started" in stderr
    assert stderr.count(f"{third.name} started") == 1  # a user's mistake is not tried again
    assert "2/3 done, 1 failed, best eval/elbo" in stderr
    assert _metrics([first, second]) == _metrics(alone)
    assert (tmp_path / "sweep.csv").exists()
    assert (tmp_path / "sweep.png").exists()


def _stub(trial, code):
    """A trial whose process runs this code."""

    class Stub(Trial):
        def command(self, python="python"):
            return [python, "-c", code]

    return Stub(trial.name, trial.overrides, trial.arguments, trial.workdir)


@pytest.fixture
def trial(config, tmp_path):
    (made,) = trials_lib.make(config, [{"seed": 0}], tmp_path)
    return made


def test_a_crash_is_tried_again_and_told(trial, tmp_path, capsys):
    code = "import sys; print('ValueError: no luck', file=sys.stderr); sys.exit(1)"
    options = Options("local", retries=2)
    (outcome,) = engines.run([_stub(trial, code)], tmp_path, options)
    assert (outcome.status, outcome.reason) == ("failed", "ValueError: no luck")
    stderr = capsys.readouterr().err
    assert stderr.count(f"{trial.name} started") == 3
    assert stderr.count("is tried again: ValueError: no luck") == 2


def test_a_process_that_is_killed_is_told(trial, tmp_path):
    code = "import os; os.kill(os.getpid(), 9)"
    (outcome,) = engines.run([_stub(trial, code)], tmp_path, Options("local", retries=0))
    assert outcome.reason == "ended by SIGKILL"


def test_a_trial_that_another_process_runs_is_waited_for(trial, tmp_path):
    from svae_jax.run import workdir as workdirs

    workdirs.create(trial.workdir)
    training = trial_lib.train(_stub(trial, "pass"), lambda: False)
    with workdirs.locked(trial.workdir):
        next(training)
        assert not (trial.workdir / "log.txt").exists()
    assert list(training)
    assert (trial.workdir / "log.txt").exists()


def test_a_process_is_asked_once_to_stop(trial):
    """A second SIGTERM would end it without saving."""
    code = (
        "import signal, time\n"
        "def save(*_): signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(2); exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open('saves', 'w').close()\n"
        "while True: time.sleep(0.1)\n"
    )
    ready = trial.workdir / "saves"
    trial.workdir.mkdir()
    training = trial_lib.train(_stub(trial, code), ready.exists, directory=trial.workdir)
    assert list(training)  # and no TrialFailed
    assert trial.outcome().status == "pending"


def test_limits_keep_a_trial_to_its_share(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert trial_lib.limits(2, 0) == {"NPROC": "2", "OMP_NUM_THREADS": "2"}
    assert trial_lib.limits(None, 0.25) == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.225"}
    assert trial_lib.limits(None, 2) == {}


# ---------------------------------------------------------------------------------- trials


def test_a_trial_is_named_by_its_overrides_and_what_decides_its_numbers(config, tmp_path):
    def name(common=None, **overrides):
        (made,) = trials_lib.make(config, [overrides], tmp_path, common or {})
        return made.name

    first = name(posterior="lowrank,rank=2", seed=1)
    assert first.startswith("lowrank_rank=2_seed=1_")
    assert name({"eval_every": 7}, posterior="lowrank,rank=2", seed=1) == first
    assert name({"num_steps": 7}, posterior="lowrank,rank=2", seed=1) != first


def test_the_posteriors_options_are_parameters(config, tmp_path):
    sweep = [{"seed": 3, "posterior": "lowrank,rank=2,d=4"}]
    (made,) = trials_lib.make(config, sweep, tmp_path)
    assert made.parameters() == {"posterior": "lowrank", "rank": 2, "d": 4, "seed": 3}


@pytest.mark.parametrize("name", ["shapes", "cifar10", "celeba"])
def test_the_sweeps_of_the_configurations_are_valid(name, tmp_path):
    path = f"{ROOT}/configs/{name}.py"
    others = ("refinements", "vectors", "arithmetic") if name == "cifar10" else ("candidates",)
    for sweep in ("models", "learning_rate", "objective", "latents", "choices", *others):
        assert len(trials_lib.make(path, trials_lib.load(path, sweep), tmp_path)) >= 6


@pytest.mark.parametrize(
    ("name", "sweep", "least"),
    [
        *itertools.product(("shapes", "cifar10", "celeba"), ("choices", "latents"), (20,)),
        *itertools.product(("shapes", "celeba"), ("candidates",), (9,)),
        ("cifar10", "refinements", 10),
    ],
)
def test_more_or_fewer_maps_leave_the_decoder_its_size(name, sweep, least, tmp_path):
    """Otherwise what a sweep says of N would be a matter of size."""
    path = f"{ROOT}/configs/{name}.py"
    sizes: dict[bool, list[int]] = {}
    for trial in trials_lib.make(path, trials_lib.load(path, sweep), tmp_path):
        config, _ = command_line.load_config(
            trial.arguments[0].partition("=")[2], trial.arguments[1:]
        )
        layers = configs.model(config).decoder.layers
        style = Style(norm=config.model.norm)
        size = stacks.num_decoder_params(layers, config.latent.maps, style)
        sizes.setdefault(config.model.norm == "none", []).append(size)
    first, *others = max(sizes.values(), key=len)  # norms have parameters of their own
    assert len(others) >= least
    np.testing.assert_allclose(others, first, rtol=0.01)


def test_the_sweeps_of_the_page_are_valid(tmp_path):
    page = Path(f"{ROOT}/experiments/sweep/README.md").read_text()
    names: dict = {"itertools": itertools, "random": random}
    for block in re.findall(r"```python\n(def .*?)```", page, re.DOTALL):
        exec(block, names)  # our own page
    for sweep, count in (("sweep_sizes", 10), ("sweep_random", 20)):
        made = trials_lib.make(f"{ROOT}/configs/cifar10.py", names[sweep](), tmp_path)
        assert len(made) == count
        assert made == trials_lib.make(f"{ROOT}/configs/cifar10.py", names[sweep](), tmp_path)


def test_the_driver_starts_no_jax_backend(config, tmp_path):
    """One on a GPU would take most of its memory from the trials."""
    code = f"""
import sys
from experiments.sweep import __main__ as command
command.main(["--config={config}", "--sweep=seeds", "--workdir={tmp_path}", "--dry_run"])
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert not {{"ray", "matplotlib", "tensorflow"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


MISTAKES = {
    "sweep": (["--sweep=seedz"], "--sweep=seedz: CONFIG has seeds, rates, twins"),
    "no_sweep": (["--sweep="], "--config and --sweep are needed"),
    "field": (["--sweep=typo"], "trial mapz=3: --config.latent.mapz: there is no such field; did"),
    "value": (["--sweep=bad_value"], "trial batch_size=-1: batch_size must be at least 1"),
    "common_field": (["--config.latent.mapz=3"], "did you mean latent.maps"),
    "common_value": (["--config.batch_size=x"], "--config.batch_size=x"),
    "both": (["--config.seed=3"], "--config.seed=3: the sweep sets seed itself"),
    "twins": (["--sweep=twins"], "trials seed=0 and lowrank eval_every=7 have the same config"),
    "nothing": (["--sweep=nothing"], "--sweep=nothing yields nothing"),
    "endless": (["--sweep=endless"], "--sweep=endless yields more than 10,000 trials"),
    "lists": (["--sweep=lists"], "--sweep=lists must yield {field: plain value}, got [1]"),
    "broken": (["--sweep=broken"], "--sweep=broken fails: ZeroDivisionError"),
    "config": (["--config=configs/cifar11.py"], "there is no such file"),
    "gpus": (["--gpus=1.5"], "--gpus=1.5: must be a fraction below 1 or a whole number"),
    "devices": (["--gpus=5"], "batch_size must be a multiple of the 5 devices"),
    "cpus": (["--cpus=0"], "--cpus=0: 0 is not a positive integer"),
    "early": (["--engine=local", "--early_stopping=9"], "--early_stopping=9 needs --engine=ray"),
    "address": (["--engine=local", "--address=auto"], "--address=auto needs --engine=ray"),
    "flag": (["--works=3"], "Unknown command line flag 'works'"),
    "report": (["--report"], "holds no sweep: there is no sweep.json"),
    "unwritable": (["--workdir=/proc/nowhere"], "--workdir=/proc/nowhere cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_runs(name, config, tmp_path):
    if name not in ("early", "address"):
        pytest.importorskip("ray")
    arguments, message = MISTAKES[name]
    own_config = any(argument.startswith("--config=") for argument in arguments)
    ordinary = ["--sweep=seeds", f"--workdir={tmp_path}"]
    ordinary += [] if own_config else [f"--config={config}"]
    with pytest.raises(UserError) as error:
        command.main([*ordinary, *arguments])
    assert message.replace("CONFIG", config) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_workdir_of_something_else_is_refused(config, tmp_path):
    def dry_run(workdir, *arguments):
        command.main([f"--config={config}", f"--workdir={workdir}", "--dry_run", *arguments])

    ours, run = tmp_path / "ours", tmp_path / "run"
    dry_run(ours, "--sweep=seeds")
    dry_run(ours, "--sweep=seeds", "--config.eval_every=9")  # changes no numbers
    for other in (["--sweep=rates"], ["--sweep=seeds", "--config.num_steps=7"]):
        with pytest.raises(UserError, match=r"belongs to another sweep: seeds of .*tiny_sweeps"):
            dry_run(ours, *other)
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds a run"):
        dry_run(run, "--sweep=seeds")


# ---------------------------------------------------------------------------------- reports


def _results(config, workdir):
    """A finished sweep: two learning rates with three seeds, a trial that failed and one pruned."""
    grid = [{"optimizer.learning_rate": r, "seed": s} for r in (1e-3, 1e-1) for s in range(3)]
    others = [{"posterior": "mvn"}, {"posterior": "naive"}, {"posterior": "mvn_full"}]
    trials = trials_lib.make(config, [*grid, *others], workdir)
    trials_lib.claim(workdir, "rates", config, trials)
    for trial in trials[:-1]:
        trial.workdir.mkdir()
    for at, trial in enumerate(trials[:6]):
        result = {
            "step": 8,
            "metrics": {"eval/elbo": float(at**2), "eval/bits_per_dim": None if at == 1 else at},
            "images_per_second": 100.0 + at,
            "parameters": {"encoder": 10, "decoder": 5},
        }
        (trial.workdir / "result.json").write_text(json.dumps(result))
    trials[6].mark(FAILED, "ValueError: no, luck")
    trials[7].mark(PRUNED, "by early stopping")
    rows = [{"step": 2, "train/loss": 3.0}, {"step": 2, "eval/elbo": -1.0}]
    text = "".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 4, "eval/el'  # being written
    (trials[7].workdir / "metrics.jsonl").write_text(text)
    return trials


def test_a_report_of_a_finished_sweep(config, tmp_path, capsys):
    _results(config, tmp_path)
    assert command.main([f"--workdir={tmp_path}", "--report"]) == 1  # a trial failed
    captured = capsys.readouterr()
    assert "ValueError: no, luck" in captured.err
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done"] * 6 + ["failed", "pruned", "pending"]
    assert [row["eval/elbo"] for row in rows[:3]] == ["0.0", "1.0", "4.0"]
    assert rows[0]["num_parameters"] == "15"
    assert rows[0]["optimizer.learning_rate"] == "0.001"
    assert (rows[7]["step"], rows[7]["eval/elbo"]) == ("2", "-1.0")
    text = re.sub(" +", " ", (tmp_path / "sweep.md").read_text())
    assert "9 trials: 6 done, 1 failed, 1 pruned, 1 pending." in text
    values = [9.0, 16.0, 25.0]
    best = f"| 0.1 | {statistics.fmean(values):.6g} | {statistics.stdev(values):.3g} | 3 | 104 |"
    worst = f"| 0.001 | {5 / 3:.6g} | {statistics.stdev([0, 1, 4]):.3g} | 3 | 101 |"
    assert 0 < text.index(best) < text.index(worst)
    assert "ValueError: no, luck" in text


def test_a_report_by_another_metric(config, tmp_path):
    trials = _results(config, tmp_path)
    found = [trial.outcome() for trial in trials]
    results.write(tmp_path, "rates", found, "eval/bits_per_dim")
    text = re.sub(" +", " ", (tmp_path / "sweep.md").read_text())
    assert f"Best eval/bits_per_dim: 0, by {trials[0].name}" in text  # lower is better
    assert text.index("| 0.001 | 1 |") < text.index("| 0.1 | 4 |")  # 0 and 2: NaN does not count
    with pytest.raises(UserError, match="--metric=eval/x: the trials have eval/bits_per_dim, eval"):
        results.write(tmp_path, "rates", found, "eval/x")


def test_pandas_reads_a_sweep_in_one_call(config, tmp_path):
    pandas = pytest.importorskip("pandas")
    command_trials = _results(config, tmp_path)
    results.write(tmp_path, "rates", [t.outcome() for t in command_trials], ELBO)
    table = pandas.read_csv(tmp_path / "sweep.csv")
    assert len(table) == 9
    means = table.groupby("optimizer.learning_rate")["eval/elbo"].mean()
    assert means.to_dict() == pytest.approx({0.001: 5 / 3, 0.1: 50 / 3})


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib import figure

    figures = []
    save = figure.Figure.savefig

    def note(self, *args, **options):
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(figure.Figure, "savefig", note)
    return figures


@pytest.mark.parametrize("name", ["eval/elbo", "eval/bits_per_dim"])
def test_trials_that_diverged_do_not_flatten_the_figure(config, tmp_path, drawn, name):
    values = {1e-4: 1.0, 3e-4: 2.0, 1e-3: 3.0, 3e-3: 4.0, 1e-2: -1e30}
    made = trials_lib.make(config, [{"optimizer.learning_rate": rate} for rate in values], tmp_path)
    found = [
        Outcome(t, "done", 8, {name: sign(name) * value})
        for t, value in zip(made, values.values(), strict=True)
    ]
    results.write(tmp_path, "x", found, name)
    (axes,) = drawn[0].axes
    worst, best = sorted(sign(name) * end for end in axes.get_ylim())
    assert -100 < worst < 1 < 4 < best < 10
    markers = {line.get_marker(): list(line.get_xdata()) for line in axes.get_lines()}
    assert markers["v" if sign(name) > 0 else "^"] == [1e-2]


def test_a_panel_judges_its_own_settings_and_has_ticks_at_their_values(config, tmp_path, drawn):
    """Beside `naive`, which has no d here and is worse, -40 is no outlier; of the others it is."""
    values = {"mvn,d=2": (10.0, 9.0), "mvn,d=3": (9.5, -40.0), "naive": (-20.0, -22.0)}
    sweep = [{"posterior": name, "objective.beta": b} for name in values for b in (0.1, 4.0)]
    made, elbos = trials_lib.make(config, sweep, tmp_path), itertools.chain(*values.values())
    found = [Outcome(t, "done", 8, {ELBO: elbo}) for t, elbo in zip(made, elbos, strict=True)]
    results.write(tmp_path, "x", found, ELBO)
    of_d = next(axes for axes in drawn[0].axes if axes.get_xlabel() == "d")
    assert list(of_d.get_xticks()) == [2, 3]
    triangles = {
        axes.get_xlabel(): [*line.get_xdata()]
        for axes in drawn[0].axes
        for line in axes.get_lines()
        if line.get_marker() == "v"
    }
    assert triangles == {"d": [3]}


def test_the_figure_has_a_panel_for_each_parameter(config, tmp_path, drawn):
    names = ("mvn", "lowrank,rank=1", "lowrank,rank=2")
    sweep = [
        {"posterior": name, "objective.beta": beta, "seed": seed}
        for name, beta, seed in itertools.product(names, (0.1, 4.0), range(2))
    ]
    made = trials_lib.make(config, sweep, tmp_path)
    found = [Outcome(t, "done", 8, {"eval/elbo": float(i)}) for i, t in enumerate(made)]
    assert results.write(tmp_path, "x", found, ELBO)[-1] == tmp_path / "sweep.png"
    (picture,) = drawn
    assert [axes.get_xlabel() for axes in picture.axes] == ["posterior", "objective.beta", "rank"]
    assert picture.axes[1].get_xscale() == "log"
    means = [tuple(line.get_ydata()) for line in picture.axes[1].get_lines()]
    assert (0.5, 2.5) in means  # mvn: trials 0 and 1 at β = 0.1, 2 and 3 at 4
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_follows_from_another_parameter_has_no_panel(config, tmp_path, drawn):
    """Here the decoder follows from N, and the batch size is the same for all."""
    stacks = {4: "3x3/8 3x3/4 3x3/image", 8: "3x3/6 3x3/4 3x3/image"}
    sweep = [
        {"posterior": f"mvn,d={d},N={n}", "model.decoder": stacks[n], "batch_size": 12}
        for d, n in itertools.product((2, 3), stacks)
    ]
    made = trials_lib.make(config, sweep, tmp_path)
    found = [Outcome(t, "done", 8, {"eval/elbo": float(i)}) for i, t in enumerate(made)]
    results.write(tmp_path, "x", found, ELBO)
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["d", "N"]
    (legend, _) = (axes.get_legend() for axes in drawn[0].axes)
    assert legend.get_title().get_text() == "N"
    assert [text.get_text() for text in legend.get_texts()] == ["4", "8"]


def test_a_random_search_has_a_panel_for_each_parameter(config, tmp_path, drawn):
    """No value comes twice, so that each parameter is a function of each other one."""
    sweep = [{"optimizer.learning_rate": 0.1 + i, "objective.beta": 1.5 + i} for i in range(4)]
    made = trials_lib.make(config, sweep, tmp_path)
    found = [Outcome(t, "done", 8, {"eval/elbo": float(i)}) for i, t in enumerate(made)]
    results.write(tmp_path, "x", found, ELBO)
    assert len(drawn[0].axes) == 2


def test_one_change_at_a_time_is_shown_against_the_first_setting(config, tmp_path, drawn):
    """Three seeds of the first setting: 10, 12 and 14; then changes, one of which diverged."""
    sweep = [
        *({"posterior": "mvn", "seed": seed} for seed in range(3)),
        {"posterior": "mvn,N=6", "model.decoder": "3x3/8 3x3/4 3x3/image"},
        {"posterior": "mvn", "objective.beta": 2.0},
        {"posterior": "mvn", "objective.beta": 0.5},
        {"posterior": "mvn", "optimizer.learning_rate": 1.0},
        {"posterior": "lowrank,rank=1"},
        {"posterior": "lowrank,rank=2"},
    ]
    made = trials_lib.make(config, sweep, tmp_path)
    values = (10.0, 12.0, 14.0, 20.0, 3.0, 13.0, -1e9, 12.0, 13.0)
    found = [Outcome(t, "done", 8, {"eval/elbo": v}) for t, v in zip(made, values, strict=True)]
    results.write(tmp_path, "x", found, ELBO)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "N=6, decoder=3x3/8 3x3/4 3x3/im…", "beta=2.0", "beta=0.5", "learning_rate=1.0",
        "posterior=lowrank, rank=1", "posterior=lowrank, rank=2",
    ]  # fmt: skip
    near, far = (line for line in axes.get_lines() if line.get_marker() in "o<")
    assert list(near.get_xdata()) == [8, -9, 1, 0, 1]
    assert list(near.get_ydata()) == [0, 1, 2, 4, 5]
    assert (far.get_marker(), list(far.get_ydata())) == ("<", [3])
    assert "posterior=mvn (12)" in axes.figure.get_suptitle()
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.x0, band.x1) == (pytest.approx(-4), pytest.approx(4))


# ---------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_board_shows_what_runs_and_what_is_best(config, tmp_path, stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    trials = _results(config, tmp_path)
    before = [trial.outcome() for trial in trials]
    out = stream()
    with Board(before, ELBO, out) as board:
        board.begin(trials[7])
        board.begin(trials[8])
        board.end(trials[7])
    text = out.getvalue()
    assert "6/9 done, 1 running, 1 failed, 1 pruned, best eval/elbo 25 (" in text
    assert trials[8].name in text
    assert "pruned: by early stopping" in text
    assert "ETA" in text
    assert ("\x1b[" in text) == (stream is Terminal)
    if stream is not Terminal:  # whole lines, each once
        assert text.count("best eval/elbo 25") == 1
        assert text.endswith("\n")


def test_metrics_know_their_direction():
    assert sign("eval/elbo") == sign("eval/psnr") == 1
    assert sign("eval/bits_per_dim_iw") == sign("eval/mse") == -1
    assert math.isnan(Outcome(None, "pending", None, {}).value(ELBO))
