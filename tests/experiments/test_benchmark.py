"""The timing experiments, on tiny networks."""

import importlib.util
import json
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import options
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import baselines, processes, stopwatch, workloads
from svae_jax import config as configs
from svae_jax import latents
from svae_jax.errors import UserError


def tiny(arg="lowrank", **model):
    """One layer that pads more on one side, and one that leaves a pixel unused, each way."""
    config = configs.base()
    config.dataset.update(height=16, width=16, channels=3)
    configs.latent_from_arg(config, arg, d=3, N=16, C=9)
    config.model.update(encoder="3x3/4/s2 3x3/8/s2/valid", decoder="3x3/16 3x3/8 5x5/image/s2")
    config.model.update(model)
    config.update(batch_size=4, num_steps=8)
    return config


@pytest.fixture
def tiny_file(tmp_path):
    """`tiny` as a file that --config takes."""
    path = tmp_path / "tiny.py"
    path.write_text("from tests.experiments.test_benchmark import tiny as get_config\n")
    return path


# ---------------------------------------------------------------------------------- measuring


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `clock.sleep(seconds)`."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    fake = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(stopwatch, "time", fake)
    return fake


def test_contenders_run_in_turn_and_their_times_are_by_unit(clock):
    calls = []

    def noting(name, seconds):
        def run(units):
            calls.append(name)
            clock.sleep(seconds * units)

        return run

    times = stopwatch.in_turn({"slow": noting("slow", 4e-3), "fast": noting("fast", 1e-3)}, 0.2)
    np.testing.assert_allclose(times["slow"], 4e-3)
    np.testing.assert_allclose(times["fast"], 1e-3)
    assert len(times["slow"]) == len(times["fast"]) >= 5
    assert stopwatch.ratio(times["slow"], times["fast"]) == pytest.approx(4)
    measured = calls[-2 * len(times["slow"]) :]
    rounds = [set(measured[i : i + 2]) for i in range(0, len(measured), 2)]
    assert all(names == {"slow", "fast"} for names in rounds)


def test_throughput_is_median_and_quartiles():
    columns = stopwatch.throughput(np.asarray([1.0, 0.5, 0.25, 0.2, 0.1]), 10)
    assert columns == {"images/s": 40, "lower quartile": 20, "upper quartile": 50, "rounds": 5}


def test_a_table_is_aligned_markdown():
    text = stopwatch.table([{"what": "a", "n": 1234.5}, {"what": "long", "n": 3}])
    assert text.splitlines() == [
        "| what | n     |",
        "| ---- | ----- |",
        "| a    | 1,234 |",
        "| long | 3     |",
    ]


# ---------------------------------------------------------------------------------- baselines


def test_plain_flax_and_pytorch_compute_the_same():
    against = ["plain", *(["pytorch"] if importlib.util.find_spec("torch") else [])]
    differences = baselines.check_same(tiny(), against, num_images=4)
    assert differences.keys() == set(against)
    assert max(differences.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["vector", "naive", "mvn,d=2", "lowrank,rank=2,d=6"])
def test_they_do_for_every_posterior(arg):
    pytest.importorskip("torch")
    baselines.check_same(tiny(arg), ["plain", "pytorch"], num_images=4)


@pytest.mark.parametrize("name", ["vector", "naive", "mvn", "lowrank"])
def test_pytorchs_posteriors_are_ours_mirrored(name):
    torch = pytest.importorskip("torch")
    from experiments.benchmark import pytorch

    size = {"height": 1, "width": 1} if name == "vector" else {"height": 2, "width": 3}
    post = latents.make(name, maps=2, rank=2 if name == "lowrank" else 1, **size)
    flat = np.random.default_rng(0).standard_normal((5, post.num_params), np.float32)
    mirrored = torch.from_numpy(flat[:, pytorch.mirrored_columns(post)])
    mean, log_variance, kl = (x.numpy() for x in pytorch.posterior(post, mirrored))
    params = post.unpack(jnp.asarray(flat))
    assert np.flip(mean, (1, 2)) == pytest.approx(np.asarray(post.mean(params)), rel=1e-5)
    stddev = np.exp(0.5 * np.flip(log_variance, (1, 2)))
    assert stddev == pytest.approx(np.asarray(post.stddev(params)), rel=1e-5)
    assert kl == pytest.approx(np.asarray(post.kl(params)), rel=1e-5)


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_a_baseline_that_computes_something_else_is_refused(wrong):
    numbers = {"loss": 2.0, "gradients": {"kernel": np.ones(3)}}
    assert baselines.largest_difference("plain", numbers, numbers) == 0
    other = {"loss": 2.0, "gradients": {"kernel": np.asarray([1, 1, wrong])}}
    with pytest.raises(UserError, match=r"plain does not compute the same.* gradients/kernel"):
        baselines.largest_difference("plain", numbers, other)


@pytest.mark.parametrize(
    ("field", "value"), [("model.norm", "none"), ("optimizer.clip_norm", 1.0), ("latent.width", 2)]
)
def test_a_configuration_without_baselines_is_refused(field, value):
    config = tiny()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=f"baselines need {field}="):
        baselines.check_same(config, ["plain"])


@pytest.mark.slow
def test_layers_that_pytorch_does_not_have_are_refused():
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="PyTorch lacks a layer"):
        baselines.check_same(tiny(encoder="4x4/4"), ["pytorch"])


# ---------------------------------------------------------------------------------- command lines


def test_the_benchmark_prints_tables_and_writes_json(tiny_file, tmp_path, capsys):
    target = tmp_path / "results.json"
    options = ["--parts=generation", "--against=", "--seconds=0.05", f"--json={target}"]
    benchmark.main([f"--config={tiny_file}:lowrank", *options])
    results = json.loads(target.read_text())
    (record,) = results["generation"]
    assert record["implementation"] == "svae_jax"
    assert 0 < record["lower quartile"] <= record["images/s"] <= record["upper quartile"]
    assert results["environment"]["jax"]
    out, err = capsys.readouterr()
    assert "| svae_jax " in out
    assert "measuring" in err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_compares(tiny_file, tmp_path, dtype):
    pytest.importorskip("torch")
    target = tmp_path / "results.json"
    options = ["--parts=training,generation", "--seconds=0.05", f"--config.model.dtype={dtype}"]
    benchmark.main([f"--config={tiny_file}:lowrank", f"--json={target}", *options])
    results = json.loads(target.read_text())
    assert results["differences"].keys() == {"plain", "pytorch"}
    for part in ("training", "generation"):
        names = [record["implementation"] for record in results[part]]
        assert names[:3] == ["svae_jax", "plain Flax", "PyTorch, eager"]
        assert results[part][0]["speed of svae_jax / this"] == 1


def test_the_papers_table_is_of_its_four_models(tiny_file, tmp_path, capsys, monkeypatch, clock):
    # The workloads have tests of their own; here they would compile four models.
    for name in ("training", "generation"):
        monkeypatch.setattr(workloads, name, lambda *_: lambda units: clock.sleep(1e-3 * units))
    target = tmp_path / "results.json"
    words = ["--parts=paper", "--seconds=0.05", f"--json={target}"]
    benchmark.main([f"--config={tiny_file}:lowrank", *words])
    records = json.loads(target.read_text())["paper"]
    assert [record["model"] for record in records] == ["vector", "naive", "mvn", "lowrank"]
    assert records[0]["epoch / vector"] == records[0]["10,000 images / vector"] == 1
    assert records[3]["paper, epoch, s"] == 173.0
    assert records[3]["epoch, s"] == pytest.approx(1.6)
    assert records[3]["10,000 images, s"] == pytest.approx(1e-2)
    assert "| lowrank " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--nonsense", "nonsense"),
        ("extra", "unexpected argument 'extra'"),
        ("--parts=training,nonsense", "--parts=['training', 'nonsense']"),
        ("--against=caffe", "--against=['caffe']"),
        ("--seconds=0", "--seconds=0"),
        ("--config=missing.py", "missing.py"),
        ("--config.latent.mapz=1", "did you mean latent.maps"),
        ("--config.batch_size=0", "batch_size must be at least 1"),
        ("--json=/missing/results.json", "/missing/results.json"),
    ],
)
def test_a_mistake_is_told_in_one_line(tiny_file, argument, message, monkeypatch, capsys):
    given = [] if argument.startswith("--config=") else [f"--config={tiny_file}:lowrank"]
    monkeypatch.setattr("sys.argv", ["benchmark", *given, argument])
    with pytest.raises(SystemExit) as exit_info:
        options.run_command(benchmark.main)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_benchmark_imports_neither_tensorflow_nor_tfds_nor_orbax():
    code = """
import sys
# Flax imports Orbax where it is installed; None makes each import fail, as if it were not.
sys.modules |= dict.fromkeys(["tensorflow", "tensorflow_datasets", "orbax", "tensorboard"])
import experiments.benchmark.__main__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---------------------------------------------------------------------------------- other parts


@pytest.mark.slow
def test_cost_against_batch_size_maps_and_size():
    def variants(part):
        records = benchmark.scaling(part, tiny(), 0.05)
        assert all(record["generation, images/s"] > 0 for record in records)
        return [record["variant"].partition("=")[2] for record in records]

    assert variants("batch_size") == ["1", "2", "4", "12", "40"]
    assert variants("maps") == ["4", "8", "16", "32", "64"]
    assert variants("size") == ["2", "3", "4", "6", "8"]


def test_a_process_of_its_own_works_and_tells_its_errors():
    with processes.OwnProcess(sleeper, 1e-3) as run:
        run(2)
        assert all(value > 0 for value in run.submit(processes._megabytes).result().values())
    with processes.OwnProcess(sleeper, "x") as run, pytest.raises(UserError, match="interpreted"):
        run(2)


def sleeper(seconds):
    return lambda units: time.sleep(seconds * units)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own():
    records = processes.memory(tiny(), 0.05, num_images=20_000)
    assert [record["images"] for record in records] == ["few", "resident", "streamed"]
    assert records[1]["array, MB"] == pytest.approx(15.36)
    assert records[1]["speed / resident"] == 1


@pytest.mark.slow
def test_a_whole_run_is_compared_with_its_steps_alone():
    config = tiny()
    config.update(log_every=2, sample_every=8, eval_every=8)
    config.checkpoint.every = 8
    cold, warm, run, before, after = (r["value"] for r in processes.whole_run(config, 0.05))
    assert cold > warm > 0
    assert min(run, before, after) > 0
