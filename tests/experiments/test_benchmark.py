"""The timing experiments, on shapes that take no time."""

import argparse
import importlib.util
import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import timing
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import candidates, plain_flax, processes, stopwatch
from svae_jax import config as configs
from svae_jax import latents
from svae_jax.errors import UserError

OPTIONS = argparse.Namespace(seconds=0.05, generation_batch=4, against=["plain"])


def tiny(arg="lowrank", **model):
    """One layer that pads more on one side, and one that leaves a pixel unused, each way."""
    config = configs.base()
    config.dataset.image_size = 16
    configs.latent_from_arg(config, arg, d=3, N=16, C=9)
    config.model.update(encoder="3x3/4/s2 3x3/8/s2/valid", decoder="3x3/16 3x3/8 5x5/image/s2")
    config.model.update(model)
    config.update(batch_size=4, num_steps=8)
    return config


# ---------------------------------------------------------------------------------- measuring


def test_candidates_run_in_turn_and_their_times_are_by_unit():
    calls = []

    def noting(name, seconds):
        def run(units):
            calls.append(name)
            time.sleep(seconds * units)

        return run

    timed = stopwatch.in_turn({"slow": noting("slow", 4e-3), "fast": noting("fast", 1e-3)}, 0.2)
    assert len(timed["slow"].seconds) == len(timed["fast"].seconds) >= 5
    assert 2 < stopwatch.ratio(timed["slow"], timed["fast"]) < 8
    measured = calls[-2 * len(timed["slow"].seconds) :]
    rounds = [set(measured[i : i + 2]) for i in range(0, len(measured), 2)]
    assert all(names == {"slow", "fast"} for names in rounds)


def test_throughput_is_median_and_quartiles():
    timed = stopwatch.Timed(np.asarray([1.0, 0.5, 0.25, 0.2, 0.1]), 5)
    assert stopwatch.throughput(timed, 10) == {"images/s": 40, "from": 20, "to": 50, "rounds": 5}


def test_a_table_is_aligned_markdown():
    text = stopwatch.table([{"what": "a", "n": 1234.5}, {"what": "long", "x": 3}])
    assert text.splitlines() == [
        "| what | n     | x |",
        "| ---- | ----- | - |",
        "| a    | 1,234 |   |",
        "| long |       | 3 |",
    ]


# ------------------------------------------------------------------------------ the same network


def test_plain_flax_and_pytorch_compute_the_same():
    rivals = ["plain", *(["pytorch"] if importlib.util.find_spec("torch") else [])]
    differences = candidates.check_same(tiny(), rivals, num_images=4)
    assert set(differences) == set(rivals)
    assert max(differences.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arg", "model"),
    [
        ("vector", {}),
        ("naive", {"norm": "none", "activation": "relu"}),
        ("mvn", {"norm": "group", "activation": "gelu"}),
        ("lowrank,rank=2,d=6", {"activation": "silu"}),
        ("mvn,d=2", {"activation": "tanh"}),
    ],
)
def test_they_do_in_every_style(arg, model):
    pytest.importorskip("torch")
    candidates.check_same(tiny(arg, **model), ["plain", "pytorch"], num_images=4)


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


def test_a_rival_that_computes_something_else_is_refused():
    numbers = {"loss": 2.0}, {"kernel": np.ones(3)}
    assert candidates.largest_difference("plain", numbers, numbers) == 0
    for wrong in (1.001, np.nan):
        other = {"loss": 2.0}, {"kernel": np.asarray([1, 1, wrong])}
        with pytest.raises(UserError, match=r"plain does not compute the same.* kernel differs by"):
            candidates.largest_difference("plain", numbers, other)


def test_pytorch_refuses_what_it_is_not_written_for():
    pytorch = pytest.importorskip("experiments.benchmark.pytorch", exc_type=ImportError)
    with pytest.raises(UserError, match=r"latent.name='mvn_full'"):
        pytorch.check(tiny("mvn_full"))
    config = tiny()
    config.optimizer.clip_norm = 1.0
    with pytest.raises(UserError, match=r"optimizer.clip_norm=1.0"):
        pytorch.check(config)
    with pytest.raises(UserError, match=r"model.encoder: PyTorch has no padding"):
        pytorch.Network(configs.model(tiny(encoder="4x4/4")), (16, 16, 3))


# ---------------------------------------------------------------------------------- command lines


@pytest.fixture
def tiny_file(tmp_path):
    """`tiny` as a file that --config takes."""
    path = tmp_path / "tiny.py"
    path.write_text("from tests.experiments.test_benchmark import tiny as get_config\n")
    return path


def test_the_benchmark_prints_tables_and_writes_json(tiny_file, tmp_path, capsys):
    target = tmp_path / "results.json"
    options = ["--parts=generation", "--against=", "--seconds=0.05", "--generation_batch=4"]
    benchmark.main([f"--config={tiny_file}:lowrank", f"--json={target}", *options])
    results = json.loads(target.read_text())
    (record,) = results["parts"]["generation"]
    assert record["implementation"] == "svae_jax"
    assert 0 < record["from"] <= record["images/s"] <= record["to"]
    assert results["environment"]["versions"]["jax"]
    out, err = capsys.readouterr()
    assert "| svae_jax " in out
    assert "measuring" in err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_compares(tiny_file, tmp_path, dtype):
    pytest.importorskip("torch")
    target = tmp_path / "results.json"
    options = ["--parts=training,generation", "--seconds=0.05", "--generation_batch=4"]
    options += [f"--config={tiny_file}:lowrank", f"--config.model.dtype={dtype}"]
    benchmark.main([f"--json={target}", *options])
    results = json.loads(target.read_text())
    assert results["differences"].keys() == {"plain", "pytorch"}
    for part in ("training", "generation"):
        records = results["parts"][part]
        titles = [record["implementation"] for record in records]
        assert titles[:3] == ["svae_jax", "plain Flax", "PyTorch, eager"]
        assert records[0]["svae_jax / it"] == 1


def test_timing_prints_the_papers_table(tiny_file, tmp_path, capsys, monkeypatch):
    # What is timed has its own tests; compiled are here no four models.
    for name in ("training", "generation"):
        monkeypatch.setattr(candidates, name, lambda *_: lambda units: time.sleep(1e-3 * units))
    target = tmp_path / "results.json"
    options = ["--images=40", "--seconds=0.05", "--generation_batch=4"]
    timing.main([f"--config={tiny_file}", f"--json={target}", *options])
    records = json.loads(target.read_text())["models"]
    assert [record["model"] for record in records] == ["vector", "naive", "mvn", "lowrank"]
    assert records[0]["epoch / vector"] == records[0]["generation / vector"] == 1
    assert records[3]["K40C epoch s"] == 173.0
    assert 1.6 <= records[3]["epoch s"] < 3.2
    assert 2.5 <= records[3]["generation s"] < 5
    out = capsys.readouterr().out
    assert "40 generated images" in out
    assert "a part of an epoch" in out


def test_timing_says_where_celeba_cannot_be_had(tiny_file, tmp_path, capsys):
    config = tiny()
    config.dataset.update(name="folder", cache_dir=str(tmp_path))
    options = argparse.Namespace(images=40, data_dir=str(tmp_path / "missing"))
    images, source = timing.load_images(config, options)
    assert images.shape == (40, 16, 16, 3)
    assert source == "40 generated images, since folder cannot be had"
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--nonsense", "--nonsense"),
        ("extra", "extra"),
        ("--parts=training,nonsense", "nonsense"),
        ("--against=caffe", "caffe"),
        ("--seconds=0", "--seconds=0"),
        ("--config=missing.py", "missing.py"),
        ("--config.nonsense=1", "nonsense"),
        ("--config.batch_size=0", "batch_size"),
        ("--json=/missing/results.json", "/missing/results.json"),
    ],
)
def test_a_mistake_is_told_in_one_line(tiny_file, argument, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", f"--config={tiny_file}:lowrank", argument])
    with pytest.raises(SystemExit) as exit_info:
        stopwatch.run(benchmark.main)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [candidates.training, plain_flax.training])
def test_training_goes_on_from_call_to_call(training):
    config = tiny()
    run = training(candidates.recipe_of(config, 12), candidates.generated_images(12, config))
    run(2)
    run(5)  # past the end of an epoch


@pytest.mark.slow
def test_costs_against_batch_size_maps_and_size():
    records = benchmark.batch_size(tiny(), OPTIONS)
    assert [record["batch size"] for record in records] == [1, 4, 12, 40]
    assert [record["d"] for record in benchmark.size(tiny(), OPTIONS)] == [2, 3, 4, 6, 8]
    assert [record["N"] for record in benchmark.maps(tiny(), OPTIONS)] == [4, 8, 16, 32, 64]


def test_a_vector_has_no_maps_to_vary():
    assert benchmark.maps(tiny("vector"), OPTIONS) == []


# ---------------------------------------------------------------------------------- processes


def test_a_process_of_its_own_works_and_tells_its_errors():
    with processes.remote(sleeper, 1e-3) as run:
        run(2)
        assert all(peak > 0 for peak in run.peaks().values())
    with (
        processes.remote(sleeper, "x") as run,
        pytest.raises(UserError, match="cannot be interpreted"),
    ):
        run(2)


def sleeper(seconds):
    return lambda units: time.sleep(seconds * units)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own():
    records = processes.memory(tiny(), OPTIONS, num_images=100_000)
    assert [record["images"] for record in records] == ["few", "resident", "streamed"]
    assert records[1]["array MB"] == pytest.approx(76.8)
    assert records[1]["/ resident"] == 1
    if "resident set MB" in records[0]:  # on Linux
        assert records[0]["resident set growth MB"] == 0 < records[2]["resident set MB"]


@pytest.mark.slow
def test_a_start_is_measured_from_outside():
    cold, warm = processes.start(tiny(), OPTIONS)
    assert cold["s to first step"] > warm["s to first step"] > 0


@pytest.mark.slow
def test_a_whole_run_is_compared_with_its_bare_step():
    config = tiny()
    config.update(log_every=2, sample_every=8, eval_every=8)
    config.checkpoint.every = 8
    before, run, after = processes.whole_run(config, OPTIONS)
    assert run["what"] == "run, 4 updates"
    assert run["images/s"] > 0
    assert before["run / it"] > 0 < after["run / it"]
