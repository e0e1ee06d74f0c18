"""The measurements on an accelerator, rehearsed on the CPU."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import options
from experiments.accelerator import __main__ as command
from experiments.accelerator import packing, reference, speed
from experiments.accelerator.parts import PARTS
from experiments.accelerator.sizes import BY_SHAPE, DATA, FULL, MODELS, TINY, configuration
from experiments.accelerator.worker import Worker, halving
from svae_jax import config as configs
from svae_jax import latents
from svae_jax.errors import UserError
from svae_jax.run import interrupt
from tests.command_line import ROOT


def blocks(count, size=32, seed=0):
    """Images of 4×4 blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return colours.repeat(size // 4, 1).repeat(size // 4, 2)


# ---------------------------------------------------------------------------------- packing


def test_images_are_unpacked_as_they_were_packed(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1030, 16, 16, 3), np.uint8)  # more than a strip
    paths = [tmp_path / "1.zip", tmp_path / "2.zip"]
    packing.pack(paths[0], {"train": noise, "test": noise[:3]})
    packing.pack(paths[1], {"train": noise[:5], "test": noise[7:9]})
    found = packing.unpack(paths)
    np.testing.assert_array_equal(found["train"], np.concatenate([noise, noise[:5]]))
    np.testing.assert_array_equal(found["test"], noise[[0, 1, 2, 7, 8]])
    assert packing.image_shape(paths) == (16, 16, 3)
    assert found["train"].dtype == np.uint8


def test_packed_images_are_small(tmp_path):
    images = blocks(100)
    packing.pack(tmp_path / "images.zip", {"train": images, "test": images})
    assert (tmp_path / "images.zip").stat().st_size < 0.1 * images.nbytes


def test_images_that_were_changed_on_the_way_are_refused(tmp_path):
    path = tmp_path / "images.zip"
    packing.pack(path, {"train": blocks(4), "test": blocks(2)})
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["test/00000.webp"] = packing._encode(blocks(2, seed=1))
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(UserError, match=r"images of test are not those that were packed"):
        packing.unpack([path])


def test_packing_prints_what_files_take(tiny_images, tmp_path, capsys):
    packing.main(
        [
            "--config=configs/shapes.py",
            f"--out={tmp_path / 'packed'}",
            "--config.dataset.name=folder",
            f"--config.dataset.data_dir={tiny_images}",
            f"--config.dataset.cache_dir={tmp_path}",
        ]
    )
    paths = sorted((tmp_path / "packed").iterdir())
    assert [path.name for path in paths] == ["images-1.zip", "images-2.zip"]
    assert len(packing.unpack(paths)["train"]) == 48
    assert "24 train, 10 test" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- the process


@pytest.fixture(scope="module")
def worker():
    with Worker("tests.experiments.accelerator_parts") as worker:
        assert worker.start() == "cpu"
        yield worker


@pytest.fixture
def run(worker):
    def run(name, seconds=100.0, request=None):
        rows = []
        ended = worker.run(name, "context", seconds, rows.append, request or interrupt.Request())
        return ended, rows

    return run


def test_a_part_fails_in_one_line_and_the_process_goes_on(run):
    ended, rows = run("failing")
    assert ended == "failed: ValueError: the reason and more"
    assert rows == [{"row": 1}]
    (before,), (after,) = (run("rows")[1] for _ in range(2))
    assert before == after  # the same process


def test_a_part_that_dies_or_runs_out_of_memory_leaves_a_new_process(run):
    pids = [run("rows")[1][0]]
    assert run("dying") == ("failed: its process ended with exit code 3", [])
    pids.append(run("rows")[1][0])
    assert run("memory")[0].startswith("failed: RuntimeError: RESOURCE_EXHAUSTED")
    pids.append(run("rows")[1][0])
    assert len({row["pid"] for row in pids}) == 3


def test_a_slow_part_is_stopped_and_its_rows_stay(run):
    begin = time.monotonic()
    assert run("slow", seconds=1.0) == ("stopped at its limit", [{"row": 1}])
    request = interrupt.Request()
    request.signal_number = signal.SIGTERM
    assert run("slow", request=request)[0] == "stopped by a signal"
    assert time.monotonic() - begin < 60


def test_a_batch_is_halved_until_it_fits():
    def measure(batch):
        if batch > 30:
            raise RuntimeError("CUDA out of memory")
        yield {"batch": batch}

    assert list(halving(measure, 100)) == [
        {"out of memory at batch": 100, "tried next": 50},
        {"out of memory at batch": 50, "tried next": 25},
        {"batch": 25},
    ]
    with pytest.raises(RuntimeError, match="another"):
        list(halving(lambda batch: (_ for _ in ()).throw(RuntimeError("another")), 100))


# ---------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("sizes", [FULL, TINY], ids=["full", "tiny"])
def test_all_configurations_can_be_trained(sizes):
    for data in DATA:
        for model in {*MODELS, *latents.names()}:
            config = configuration(sizes, data, model, dtype="bfloat16")
            configs.check(config, num_devices=1)
            assert (config.dataset.height, config.dataset.width, 3) in BY_SHAPE


@pytest.mark.parametrize("sizes", [FULL, TINY], ids=["full", "tiny"])
def test_each_posterior_has_its_reference(sizes):
    stored = reference.load(sizes)
    assert stored.keys() == set(latents.names())
    for numbers in stored.values():
        assert numbers.keys() - {"devices"} == reference.TOLERANCES.keys()
        if sizes is FULL:
            assert all(said["kernels"] > 50 for said in numbers["devices"].values())


def test_goals_stand_beside_what_was_measured():
    rows = [
        {"training": "CelebA", "at": "usual batch", "model": model, "batch": 100, "epoch, s": epoch,
         "training time / vector": ratio}
        for model, epoch, ratio in (("vector", 3.0, 1.0), ("lowrank", 4.5, 1.5))
    ]  # fmt: skip
    table = {row["goal"].partition(":")[0]: row for row in speed.goals({"speed": rows})}
    assert table["160,000 images at the usual batch"]["measured"] == "3 to 4.5"
    assert table["160,000 images at the usual batch"]["met in"] == "1 of 2 cases"
    assert table["training, time of lowrank / vector"]["met in"] == "0 of 1 cases"
    assert table["10,000 images generated"]["measured"] == "not measured"


def test_the_fastest_of_the_larger_batches_is_found():
    rows = [
        {"larger batches": "CelebA", "dtype": "float32", "batch": batch, "images/s": rate}
        for batch, rate in ((1000, 5.0), (3000, 7.0), (10_000, 6.0))
    ]
    assert speed.fastest([{"training": "CelebA"}, *rows], "CelebA", "float32") == 3000
    assert speed.fastest(rows, "CelebA", "bfloat16") is None


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "images.zip"
    packing.pack(path, {"train": blocks(40), "test": blocks(20, seed=1)})
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget=59"], "--budget=59: 59 is not integer >= 60"),
        (["--budget=soon"], "--budget=soon: invalid literal"),
        ([], "--budget"),
        (
            ["--budget=60", "--parts=device,nonsense"],
            "--parts=['device', 'nonsense']: must be among device",
        ),
        (["--budget=60", "--images=missing.zip"], "missing.zip is no file of packed images"),
        (["--budget=60", "--images=wrong.zip"], "they are of shape (28, 28, 3); possible are"),
        (["--budget=60", "--images=test.zip"], "holds test; train and test are needed"),
        (["--budget=60", "--out=full"], "--out=full is not empty"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/results.json").touch()
    packing.pack(Path("wrong.zip"), {"train": blocks(2, 28), "test": blocks(2, 28)})
    packing.pack(Path("test.zip"), {"test": blocks(2)})
    monkeypatch.setattr("sys.argv", ["accelerator", "--out=out", *words])
    with pytest.raises(SystemExit) as exit_info:
        options.run_command(command.main)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


class FakeWorker:
    """Runs no part; `measure` says what each gives and how it ends."""

    platform = "gpu"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self):
        return self.platform

    def run(self, name, context, seconds, add, request):
        return self.measure(name, seconds, add)


@pytest.fixture
def fake(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(command, "Worker", FakeWorker)
    return lambda measure: monkeypatch.setattr(
        FakeWorker, "measure", staticmethod(measure), raising=False
    )


def test_without_an_accelerator_it_runs_only_if_asked(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeWorker, "platform", "cpu")
    with pytest.raises(UserError, match="JAX finds no accelerator; with --allow_cpu"):
        command.main(["--budget=60", f"--out={tmp_path / 'out'}"])


def test_results_are_written_after_each_row(fake, tmp_path):
    out, limits = tmp_path / "out", {}

    def measure(name, seconds, add):
        limits[name] = seconds
        add({"model": "a", "value": 1.5})
        add({"model": "b", "value": 2.5})
        add({"other": name})
        assert f"## {name}: running" in (out / "results.md").read_text()
        return "failed: for a reason" if name == "speed" else "done"

    fake(measure)
    assert command.main(["--budget=100", f"--out={out}"]) == 0
    results = json.loads((out / "results.json").read_text())["parts"]
    assert list(results) == list(PARTS)
    assert results["speed"]["status"] == "failed: for a reason"
    assert results["train_best"]["status"] == "skipped: no --images"
    assert results["memory"]["rows"][2] == {"other": "memory"}
    text = (out / "results.md").read_text()
    assert "| b     | 2.500 |" in text
    assert "| goal " in text
    # Time that the first parts left goes to the last one.
    assert limits["device"] < limits["memory"]
    assert 80 < limits["memory"] <= 90


def test_parts_are_skipped_when_the_budget_is_out(fake, tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(command.time, "monotonic", lambda: now)

    def measure(name, seconds, add):
        nonlocal now
        now += 70 if name == "posteriors" else 1
        return "done"

    fake(measure)
    assert command.main(["--budget=60", f"--out={tmp_path / 'out'}"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    statuses = [results[name]["status"] for name in ("device", "posteriors", "speed", "memory")]
    assert statuses == ["done", "done", *2 * ["skipped: the budget is out"]]


def test_a_signal_leaves_what_was_measured(fake, tmp_path):
    def measure(name, seconds, add):
        add({"row": 1})
        os.kill(os.getpid(), signal.SIGTERM)
        return "stopped by a signal"

    fake(measure)
    assert command.main(["--budget=60", f"--out={tmp_path / 'out'}"]) == 128 + signal.SIGTERM
    results = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert results["device"]["rows"] == [{"row": 1}]
    assert results["posteriors"]["status"] == "skipped: stopped by SIGTERM"


def rehearse(image_file, tmp_path, budget, parts=""):
    """The very command, in processes that cannot import TensorFlow; its parts and its stderr."""
    blocked = ["tensorflow", "tensorflow_datasets", "tensorboard"]
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    begin = time.monotonic()
    process = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.accelerator", f"--budget={budget}", "--tiny"),
            *("--allow_cpu", f"--out={tmp_path / 'out'}", f"--images={image_file}"),
            f"--parts={parts}",
        ],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * budget,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert time.monotonic() - begin < budget + 10
    assert "no accelerator: this runs on the CPU" in process.stderr
    return json.loads((tmp_path / "out" / "results.json").read_text())["parts"], process.stderr


def test_a_rehearsal_without_tensorflow_and_tfds(image_file, tmp_path):
    """Nothing may fail; on a busy machine a part may be stopped."""
    found, stderr = rehearse(image_file, tmp_path, 60, "device,train_best,posteriors")
    assert found["device"]["status"] == "done"
    assert not any(part["status"].startswith("failed") for part in found.values()), stderr
    assert all(row["as on a CPU"] == "yes" for row in found["posteriors"]["rows"])
    if found["train_best"]["status"] == "done":
        *bounds, _ = found["train_best"]["rows"]
        assert [row["epochs"] for row in bounds] == [1, 2]
        assert "alone, not to TensorBoard" in stderr


@pytest.mark.slow
def test_all_parts_end_well(image_file, tmp_path):
    found, stderr = rehearse(image_file, tmp_path, 900)
    without_torch = importlib.util.find_spec("torch") is None
    for name, part in found.items():
        expected = "failed: UserError: PyTorch is not installed"
        assert part["status"] == (expected if name == "pytorch" and without_torch else "done"), (
            stderr
        )
    assert [row["as on a CPU"] for row in found["posteriors"]["rows"]] == 6 * ["yes"]
    assert {"results.json", "results.md", "samples.png"} <= set(os.listdir(tmp_path / "out"))
