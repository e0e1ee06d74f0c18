"""Whole runs on tiny images: files, resuming, devices, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import svae_jax
from svae_jax import config as configs
from svae_jax import files
from svae_jax import recipe as recipe_lib
from svae_jax.data import cache
from svae_jax.devices import sharding
from svae_jax.errors import UserError
from svae_jax.evaluation import grids, steps
from svae_jax.run import checkpoint
from svae_jax.training import feed, loop, step
from svae_jax.training.metrics import TrainMetrics
from tests import command_line, tiny

ROOT = Path(__file__).parents[2]

MOST_EXCHANGES = 13  # of a step on several CPU devices


def _rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _final(directory):
    return checkpoint.fingerprint(checkpoint.load(directory / "checkpoints").state)


@pytest.fixture
def finished(tiny_config, tmp_path):
    directory = tmp_path / "run"
    return directory, loop.train(tiny_config, directory)


def test_a_run_writes_all_its_files(finished, tiny_config):
    directory, result = finished
    for name in ("samples", "samples_gaussian", "reconstructions"):
        assert sorted(p.name for p in (directory / name).iterdir()) == ["000004.png", "000008.png"]
    assert list(directory.glob("events.out.tfevents.*"))
    assert sorted(int(p.name) for p in (directory / "checkpoints").iterdir()) == [4, 6, 8]
    assert json.loads((directory / "config.json").read_text()) == tiny_config.to_dict()
    assert json.loads((directory / "result.json").read_text()) == result
    rows = _rows(directory)
    assert [row["step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "eval/elbo" in row] == [4, 8]
    train_row = next(row for row in rows if row["step"] == 4 and "train/loss" in row)
    assert set(train_row) == {
        "step", "train/loss", "train/reconstruction", "train/kl", "train/sigma",
        "train/skipped", "images_per_second",
    }  # fmt: skip
    assert result["step"] == 8
    saved = checkpoint.load(directory / "checkpoints")
    assert (saved.step, saved.config) == (8, tiny_config.to_dict())
    last = next(row for row in rows if row["step"] == 8 and "eval/elbo" in row)
    assert {**result["metrics"], "step": 8} == last
    assert result["parameters"]["encoder"] > 0
    assert result["device"]["platform"] == "cpu"


def test_a_run_is_the_same_under_other_rules_of_numbers(tiny_config, tmp_path):
    tiny_config.num_steps = 2
    plain = loop.train(tiny_config, tmp_path / "plain")
    rules = (jax.enable_x64(True), jax.numpy_dtype_promotion("strict"))
    with rules[0], rules[1], jax.numpy_rank_promotion("raise"):
        other = loop.train(tiny_config, tmp_path / "other")
    assert other["metrics"] == plain["metrics"]
    kept = checkpoint.load(tmp_path / "other" / "checkpoints").state["state"]["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("begins", [True, False], ids=["begun with 64 bits", "continued with them"])
def test_a_run_goes_on_under_other_rules_of_numbers(tiny_config, tmp_path, begins):
    tiny_config.update(num_steps=4, eval_every=2)
    plain = loop.train(tiny_config, tmp_path / "plain")
    for num_steps, x64 in ((2, begins), (4, not begins)):
        tiny_config.num_steps = num_steps
        with jax.enable_x64(x64):
            other = loop.train(tiny_config, tmp_path / "other")
    assert other["metrics"] == plain["metrics"]


def test_pictures_show_originals_above_their_reconstructions(finished, tiny_images):
    directory, _ = finished
    picture = np.asarray(Image.open(directory / "reconstructions" / "000008.png"))
    originals = [np.asarray(Image.open(p)) for p in tiny.pictures(tiny_images, "test")]
    trained = svae_jax.load(directory)
    pixels = np.stack(originals)
    reconstructions = steps.reconstruct(
        trained.model, trained.variables, recipe_lib.stream(0, "eval"), pixels
    )
    np.testing.assert_array_equal(picture, grids.pairs(pixels, reconstructions))
    # The first tile, enlarged eight times behind a border of two pixels, is the first original.
    np.testing.assert_array_equal(picture[2:66:8, 2:66:8], originals[0])


def test_a_finished_run_returns_at_once(finished, tiny_config, monkeypatch):
    directory, result = finished
    monkeypatch.setattr(feed, "make", None)  # nothing is trained
    assert loop.train(tiny_config, directory) == result


def test_the_bound_can_be_asked_for_afterwards(finished, tiny_config, monkeypatch):
    directory, result = finished
    tiny_config.importance_samples = 4
    again = loop.train(tiny_config, directory)
    bound = again["metrics"].pop("eval/bits_per_dim_iw")
    assert bound < result["metrics"]["eval/bits_per_dim"]
    assert again["metrics"].pop("eval/elbo_iw") > result["metrics"]["eval/elbo"]
    assert again == {**result, "importance_samples": 4}
    assert _rows(directory)[-1]["eval/bits_per_dim_iw"] == bound
    monkeypatch.setattr(feed, "make", None)
    assert loop.train(tiny_config, directory)["metrics"]["eval/bits_per_dim_iw"] == bound


def test_a_run_that_has_left_nothing_may_begin_anew_with_another_configuration(
    tiny_config, tmp_path
):
    """One whose first step ran out of memory, say."""
    files.write_json(tmp_path / "config.json", tiny_config.to_dict())
    tiny_config.update(batch_size=6, num_steps=1)
    assert loop.train(tiny_config, tmp_path)["step"] == 1


def test_the_training_step_is_compiled_once(tiny_config, tmp_path, caplog):
    tiny_config.update(log_every=1, num_steps=3)
    with jax.log_compiles():
        loop.train(tiny_config, tmp_path)
    steps = [line for line in caplog.messages if line.startswith("Compiling jit(many)")]
    assert len(steps) == 1


@pytest.mark.usefixtures("no_pictures")
def test_the_best_checkpoint_is_loaded_on_request(tiny_config, tmp_path):
    tiny_config.optimizer.learning_rate = 1e-2
    loop.train(tiny_config, tmp_path)
    elbo = {row["step"]: row["eval/elbo"] for row in _rows(tmp_path) if "eval/elbo" in row}
    assert svae_jax.load(tmp_path, best=True).step == max(elbo, key=elbo.get)


def test_a_trained_run_is_loaded_in_one_call(finished, tiny_config):
    directory, _ = finished
    trained = svae_jax.load(directory)
    assert trained.step == 8
    assert trained.config.to_dict() == tiny_config.to_dict()
    z = trained.model.sample_prior(jax.random.key(0), 2)
    assert trained.model.apply(trained.variables, z, method="decode").shape == (2, 8, 8, 3)
    saved = checkpoint.load(directory / "checkpoints").state["state"]["params"]
    jax.tree.map(np.testing.assert_array_equal, trained.variables["params"], saved)


def test_what_is_loaded_is_the_average_where_there_is_one(tiny_config, tmp_path):
    tiny_config.optimizer.ema_decay = 0.5
    loop.train(tiny_config, tmp_path)
    trained = svae_jax.load(tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoints").state["state"]
    jax.tree.map(np.testing.assert_array_equal, trained.variables, saved["ema"])
    head = ("encoder", "Dense_0", "kernel")
    assert not np.array_equal(
        trained.variables["params"][head[0]][head[1]][head[2]],
        saved["params"][head[0]][head[1]][head[2]],
    )


def test_loading_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the workdir of a run"):
        svae_jax.load(tmp_path)


def test_loading_a_checkpoint_that_is_not_of_training_is_refused(tiny_config, tmp_path):
    files.write_json(tmp_path / "config.json", tiny_config.to_dict())
    with checkpoint.Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"mine": np.zeros(2)}, config={})
    with pytest.raises(UserError, match="none is of a training run"):
        svae_jax.load(tmp_path)


class Interrupted(Exception):
    pass


def _interrupt_after(monkeypatch, last):
    """Training dies once it would go past this step, as a killed process does."""
    make = feed.make

    def dying(*args):
        run = make(*args)

        def limited(state, metrics, at, most):
            if at == last:
                raise Interrupted
            return run(state, metrics, at, most)

        return limited

    monkeypatch.setattr(feed, "make", dying)


def test_interrupted_anywhere_a_run_ends_in_the_same_bits(tiny_config, tmp_path, monkeypatch):
    tiny_config.optimizer.ema_decay = 0.9
    loop.train(tiny_config, tmp_path / "whole")

    def curves(directory):  # all rows, but for the one number that is of the clock
        rows = _rows(directory)
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]

    for last in range(1, tiny_config.num_steps):
        broken = tmp_path / f"broken_after_{last}"
        with monkeypatch.context() as patch:
            _interrupt_after(patch, last)
            with pytest.raises(Interrupted):
                loop.train(tiny_config, broken)
        assert not (broken / "result.json").exists()
        loop.train(tiny_config, broken)
        assert _final(broken) == _final(tmp_path / "whole")
        assert curves(broken) == curves(tmp_path / "whole")


def test_a_longer_run_equals_a_continued_one(tiny_config, tmp_path):
    tiny_config.num_steps = 4
    loop.train(tiny_config, tmp_path / "continued")
    tiny_config.num_steps = 8
    result = loop.train(tiny_config, tmp_path / "continued")
    assert result["step"] == 8
    loop.train(tiny_config, tmp_path / "whole")
    assert _final(tmp_path / "continued") == _final(tmp_path / "whole")


def test_a_run_stopped_before_its_result_only_writes_it(finished, tiny_config):
    directory, result = finished
    rows, state = _rows(directory), _final(directory)
    (directory / "result.json").unlink()
    again = loop.train(tiny_config, directory)
    assert again["metrics"] == result["metrics"]
    assert (_rows(directory), _final(directory)) == (rows, state)


@pytest.mark.usefixtures("optimised")
def test_streamed_and_resident_images_give_the_same_bits(tiny_config, tmp_path):
    loop.train(tiny_config, tmp_path / "resident")
    tiny_config.dataset.resident_share = 0.0
    loop.train(tiny_config, tmp_path / "streamed")
    assert _final(tmp_path / "resident") == _final(tmp_path / "streamed")


def test_streaming_releases_what_it_has_read(tiny_config, monkeypatch):
    released = []
    monkeypatch.setattr(cache, "release", released.append)
    recipe, mesh = configs.recipe(tiny_config, 3), sharding.make_mesh()
    pixels = np.zeros((50, 8, 8, 3), np.uint8)
    run = feed.make(recipe, pixels, mesh, 0.0)
    state, metrics = step.init_state(recipe), TrainMetrics.empty()
    for at in range(3):
        state, metrics, _ = run(state, metrics, at, 1)
    assert len(released) >= 3
    assert all(array is pixels for array in released)


def test_many_steps_in_one_dispatch_equal_single_ones(tiny_config, monkeypatch):
    """What accelerators do, on the CPU: the loop crosses epochs (of 4 updates here) too."""
    recipe, mesh = configs.recipe(tiny_config, 10), sharding.make_mesh()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3)).astype(np.uint8)
    ends = []
    for platforms in ((), ("cpu",)):
        monkeypatch.setattr(feed, "_LOOPLESS", ("cpu",) if not platforms else ())
        run = feed.make(recipe, pixels, mesh, 0.5)
        state, metrics, at = step.init_state(recipe), TrainMetrics.empty(), 0
        while at < 10:
            state, metrics, made = run(state, metrics, at, min(3, 10 - at))
            at += made
        ends.append((state, metrics))
    (single, a), (looped, b) = ends
    assert int(looped.step) == 10
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), single, looped)
    assert float(a.compute()["loss"]) == pytest.approx(float(b.compute()["loss"]), rel=1e-5)


_DEVICES = """
import collections, json, re, sys
import jax
import numpy as np
import svae_jax.config as configs
from svae_jax.training import feed, step
from svae_jax.devices import sharding
from svae_jax.training.metrics import TrainMetrics
config = configs.from_dict(json.loads(sys.argv[1]))
recipe = configs.recipe(config, 20)
parts, train_step = set(), step.train_step
def watched(recipe, state, pixels):
    jax.debug.inspect_array_sharding(
        pixels, callback=lambda s: parts.add(s.shard_shape(pixels.shape)[0])
    )
    return train_step(recipe, state, pixels)
step.train_step = watched
pixels = np.random.default_rng(0).integers(0, 256, (320, 8, 8, 3)).astype(np.uint8)
order = step.epoch_permutation(recipe.seed, 0, 320)  # of all 20 steps
for count, streams in ((1, False), (2, False), (4, False), (4, True), (8, False)):
    mesh = sharding.make_mesh(jax.devices()[:count])
    everywhere = sharding.replicated(mesh)
    state, empty = jax.jit(
        lambda: (step.init_state(recipe), TrainMetrics.empty()), out_shardings=everywhere
    )()
    if streams:
        update, given, exchanges = feed.make(recipe, pixels, mesh, 0.0), (), None
    else:
        images = sharding.put(pixels.reshape(320, -1), sharding.replicated_rows(mesh))
        given = images, jax.device_put(order, everywhere), 1
        update = feed.resident_update(recipe, mesh).lower(state, empty, *given).compile()
        exchange = r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\\("
        exchanges = collections.Counter(re.findall(exchange, update.as_text()))
    losses = []
    for at in range(20):
        state, metrics, *_ = update(state, empty, *(given or (at, 1)))
        losses.append(float(metrics.compute()["loss"]))
    print(json.dumps([count, [*parts], losses, exchanges]))
    parts.clear()
"""


def test_any_number_of_devices_gives_the_same_losses(tiny_config):
    """Of resident images, and of streamed ones on four devices."""
    tiny_config.optimizer.learning_rate = 1e-4
    tiny_config.batch_size = 16
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, json.dumps(tiny_config.to_dict())], cwd=ROOT,
        env=os.environ | command_line.host_devices(8),
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [count for count, *_ in found] == [1, 2, 4, 4, 8]
    alone = found[0][2]
    assert len(alone) == 20
    for count, parts, losses, exchanges in found:
        assert parts == [16 // count]  # each device has its own part of a batch
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
        if exchanges is not None:  # sums alone, never images
            assert set(exchanges) == ({"all-reduce"} if count > 1 else set())
            assert exchanges.get("all-reduce", 0) <= MOST_EXCHANGES


# What is refused, before anything is compiled.


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(step, "init_state", None)
    monkeypatch.setattr(feed, "make", None)


@pytest.mark.usefixtures("nothing_compiled")
def test_another_configuration_is_refused_and_named(tiny_config, tmp_path):
    files.write_json(tmp_path / "config.json", tiny_config.to_dict())
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    tiny_config.update(seed=1)
    tiny_config.latent.maps = 8
    with pytest.raises(UserError, match=r"latent.maps=8 \(was 4\)") as caught:
        loop.train(tiny_config, tmp_path)
    assert "seed=1 (was 0)" in str(caught.value)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("text", ['{"seed": ', "[" * 100_000], ids=["cut", "nested"])
def test_a_damaged_config_is_told(tiny_config, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(UserError, match=r"config.json is damaged"):
        loop.train(tiny_config, tmp_path)


@pytest.mark.usefixtures("nothing_compiled")
def test_a_workdir_among_the_pictures_is_refused_and_not_made(tiny_config):
    directory = Path(tiny_config.dataset.data_dir) / "train" / "run"
    with pytest.raises(UserError, match=r"--workdir=.*run lies among the pictures of dataset"):
        loop.train(tiny_config, directory)
    assert not directory.exists()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_workdir_that_cannot_be_written_is_refused(tiny_config, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*cannot be written"):
        loop.train(tiny_config, blocked / "run")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "changed",
    [
        {"latent.name": "vector", "latent.height": 1, "latent.width": 1, "model.parity_maps": 24,
         "model.decoder": "3x3/16 3x3/8 3x3/image", "objective.sigma": "learned"},
        {"latent.name": "naive", "latent.height": 2, "objective.scaling": "released_code"},
        {"latent.name": "mvn", "model.norm": "group", "objective.free_bits": 0.1},
        {"latent.name": "mvn_full", "model.norm": "none", "dataset.channels": 1},
        {"latent.name": "lowrank_full", "latent.rank": 2, "model.dtype": "bfloat16"},
    ],
    ids=lambda changed: changed["latent.name"],
)  # fmt: skip
def test_every_posterior_and_option_trains(tiny_config, tmp_path, changed):
    if changed.get("dataset.channels") == 1:
        grey = tmp_path / "grey"
        for split in ("train", "test"):
            (grey / split).mkdir(parents=True)
            for i in range(12):
                Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(grey / split / f"{i}.png")
        tiny_config.dataset.data_dir = str(grey)
    for field, value in changed.items():
        section, _, name = field.rpartition(".")
        tiny_config[section][name] = value
    tiny_config.update(importance_samples=3, num_steps=6, eval_every=1, log_every=1)
    tiny_config.optimizer.update(learning_rate=1e-2, clip_norm=100.0, ema_decay=0.5)
    result = loop.train(tiny_config, tmp_path / "run")
    elbo = [row["eval/elbo"] for row in _rows(tmp_path / "run") if "eval/elbo" in row]
    assert elbo[-1] > elbo[0]
    metrics = result["metrics"]
    assert metrics["eval/bits_per_dim_iw"] < metrics["eval/bits_per_dim"] + 0.05
    trained = svae_jax.load(tmp_path / "run")
    z = trained.model.sample_prior(jax.random.key(0), 2)
    images_ = trained.model.apply(trained.variables, z, method="decode")
    assert images_.shape == (2, 8, 8, tiny_config.dataset.channels)
