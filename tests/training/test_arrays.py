"""Runs on arrays from Python, from training to the report; priors and likelihoods as tables."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

import svae_jax
from svae_jax import config as configs
from svae_jax import data, latents, likelihoods, sampler_config
from svae_jax import recipe as recipe_lib
from svae_jax.analysis import drawing, evaluating, fitting
from svae_jax.analysis.report import page
from svae_jax.data.record import Record
from svae_jax.devices import sharding
from svae_jax.errors import UserError
from svae_jax.evaluation import bounds
from svae_jax.evaluation.quality import wasserstein
from svae_jax.model import linear
from svae_jax.pixels import PixelRange
from svae_jax.run import checkpoint, workdir
from svae_jax.run.checkpoint import Checkpointer
from svae_jax.training import feed, loop, step
from svae_jax.training import job as jobs
from tests import command_line, tiny
from tests.real_data import real_data_dir
from tests.run.test_survival import fingerprint, rows


def small(size, **changed):
    """A configuration for arrays of this size, of 6 steps in seconds."""
    config = configs.base()
    stride = f"{size // 8}x{size // 8}/image/s{size // 8}" if size > 8 else "3x3/image"
    config.latent.update(name="naive", height=2, width=2, maps=3)
    config.model.update(encoder=f"3x3/4/s{size // 4}", decoder=f"3x3/4 3x3/4 {stride}", norm="none")
    config.optimizer.learning_rate = 1e-3
    config.update(batch_size=8, num_steps=6, log_every=1, eval_every=3, sample_every=3)
    config.checkpoint.every = 1
    config.update_from_flattened_dict(changed)
    return config


def blobs(rng, count, size, channels):
    """Smooth images from 0 to 1."""
    y, x = np.mgrid[:size, :size] / size
    at, wide = (
        rng.uniform(0.2, 0.8, (2, count, 1, 1, channels)),
        rng.uniform(0.1, 0.3, (count, 1, 1, 1)),
    )
    squares = (y[..., None] - at[0]) ** 2 + (x[..., None] - at[1]) ** 2
    return np.exp(-squares / wide**2)


class Case(NamedTuple):
    """A trained run of arrays from Python."""

    config: ml_collections.ConfigDict
    images: tuple[np.ndarray, np.ndarray]
    directory: object
    result: dict


def _trained(tmp_path_factory, config, train, test):
    directory = tmp_path_factory.mktemp("arrays") / "whole"
    result = loop.train(config, directory, images=(train, test))
    return Case(config, (train, test), directory, result)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """float32 16×16×5 in units from about -3 to 11, with all that has parameters of its own."""
    values = 14 * blobs(np.random.default_rng(0), 64, 16, 5) - 3
    train, test = np.split(values.astype(np.float32), [40])
    changed = {
        "latent.name": "mvn",
        "latent.prior": "tensor_normal",
        "objective.likelihood": "gaussian_channels",
        "optimizer.ema_decay": 0.5,
    }
    return _trained(tmp_path_factory, small(16, **changed), train, test)


@pytest.fixture(scope="module")
def twelve_bits(tmp_path_factory):
    """uint16 grey 64×64 without a channel axis, of which 12 bits are used."""
    levels = np.round(100 + 3895 * blobs(np.random.default_rng(1), 64, 64, 1)[..., 0])
    train, test = np.split(levels.astype(np.uint16), [40])
    return _trained(tmp_path_factory, small(64, **{"dataset.value_range": "0,4095"}), train, test)


@pytest.fixture(scope="module", params=["floats", "twelve_bits"])
def case(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(step, "init_state", None)
    monkeypatch.setattr(feed, "make", None)


def refused(message, *args, **kwargs):
    """Training is refused in one line that matches."""
    with pytest.raises(UserError, match=message) as error:
        loop.train(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, last):
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


# The same bits, wherever the images are.


@pytest.fixture
def folder_arrays(tiny_images):
    """The images of the folder, as a user would read them."""
    return tuple(
        np.stack([np.asarray(Image.open(p)) for p in tiny.pictures(tiny_images, split)])
        for split in ("train", "test")
    )


def assert_same_run(ours, theirs):
    """All arrays of the last checkpoint, and all metrics."""
    loaded = [checkpoint.load(d / "checkpoints") for d in (ours, theirs)]
    leaves = [jax.tree_util.tree_leaves_with_path(item.state) for item in loaded]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, one), (_, other) in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))
    assert fingerprint(ours) == fingerprint(theirs)
    assert rows(ours) == rows(theirs)


def of_folder(tiny_images, tmp_path_factory, **changed):
    """A configuration for the folder of `tiny_images`."""
    cache_dir = str(tmp_path_factory.getbasetemp() / "cache")
    config = small(8, **changed)
    config.dataset.update(name="folder", data_dir=str(tiny_images), cache_dir=cache_dir)
    config.dataset.update(height=8, width=8, channels=3)
    return config


@pytest.fixture(scope="module")
def folder_run(tiny_images, tmp_path_factory):
    """A run of the folder, with its configuration."""
    changed = {"model.norm": "batch", "optimizer.ema_decay": 0.9}
    config = of_folder(tiny_images, tmp_path_factory, **changed)
    directory = tmp_path_factory.mktemp("folder") / "run"
    loop.train(config, directory)
    return directory, config


def test_arrays_train_to_the_bits_of_a_folder(folder_run, folder_arrays, tmp_path):
    directory, config = folder_run
    taken = config.copy_and_resolve_references()
    taken.dataset.update(height=0, width=0, channels=0)
    loop.train(taken, tmp_path / "run", images=folder_arrays)
    assert_same_run(tmp_path / "run", directory)
    assert (taken.dataset.name, taken.dataset.height) == ("folder", 0)  # the user's own
    found = json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]
    assert (found["name"], found["height"], found["width"], found["channels"]) == (
        "arrays",
        8,
        8,
        3,
    )
    records = [json.loads((d / "data.json").read_text()) for d in (tmp_path / "run", directory)]
    assert records[0] == records[1]
    for name in ("samples", "reconstructions"):
        ours, theirs = (
            (d / name / "000006.png").read_bytes() for d in (tmp_path / "run", directory)
        )
        assert ours == theirs


@pytest.mark.usefixtures("no_pictures")
def test_arrays_train_to_the_bits_of_tfds(tmp_path, tmp_path_factory):
    places = {
        "data_dir": real_data_dir("cifar10"),
        "cache_dir": str(tmp_path_factory.getbasetemp() / "cache"),
    }
    config = small(32, num_steps=3)
    config.dataset.update(name="cifar10", height=32, width=32, channels=3, **places)
    config.dataset.update(split="train[:24]", eval_split="test[:16]")
    loop.train(config, tmp_path / "tfds")
    train, test = (
        np.array(data.load("cifar10", split, image_shape=(32, 32, 3), **places))
        for split in ("train[:24]", "test[:16]")
    )
    config.dataset.update(split="train", eval_split="test")
    loop.train(config, tmp_path / "arrays", images=(train, test))
    assert_same_run(tmp_path / "arrays", tmp_path / "tfds")


@pytest.mark.usefixtures("nothing_compiled")
def test_splits_of_arrays_are_cut_as_those_of_data_sets(folder_run, folder_arrays, tmp_path):
    directory, config = folder_run
    train, test = folder_arrays
    given = {"first": train[:30], "more": np.concatenate([test, train[30:]])}
    config = config.copy_and_resolve_references()
    config.dataset.update(split="first+more[20:]", eval_split="more[:20]")
    job = jobs.prepare(config, tmp_path, images=given)
    assert job.record == Record.from_json(json.loads((directory / "data.json").read_text()))
    assert np.shares_memory(job.eval_images, given["more"])


# Two programs, which have the same bits as they are compiled in use.
@pytest.mark.usefixtures("no_pictures", "optimised")
def test_mapped_and_streamed_arrays_give_the_same_bits(floats, tmp_path, monkeypatch):
    for name, array in zip(("train", "test"), floats.images, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    loop.train(floats.config, tmp_path / "resident", images=floats.images)
    mapped = tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("train", "test"))
    given = []
    streamed = feed._streamed
    monkeypatch.setattr(feed, "_resident", None)
    monkeypatch.setattr(feed, "_streamed", lambda *a: (given.append(a[1]), streamed(*a))[1])
    config = floats.config.copy_and_resolve_references()
    config.dataset.update(resident_share=0.0, cache_dir=str(tmp_path / "cache"))
    loop.train(config, tmp_path / "run", images=mapped)
    assert isinstance(given[0], np.memmap)
    assert np.shares_memory(given[0], mapped[0])
    assert_same_run(tmp_path / "run", tmp_path / "resident")
    assert len(list((tmp_path / "cache" / "described").iterdir())) == 2


@pytest.mark.usefixtures("no_pictures")
def test_interrupted_a_run_of_floats_ends_in_the_same_bits(floats, tmp_path, monkeypatch):
    for last in (2, 4):
        with monkeypatch.context() as patch:
            interrupt_after(patch, last)
            with pytest.raises(Interrupted):
                loop.train(floats.config, tmp_path, images=floats.images)
        assert not (tmp_path / "result.json").exists()
    again = loop.train(floats.config, tmp_path, images=floats.images)
    assert again["metrics"] == floats.result["metrics"]
    assert_same_run(tmp_path, floats.directory)


KILLED = """
import json, sys, time
import numpy as np
from svae_jax import config as configs
from svae_jax.training import feed, loop
make = feed.make
def slow(*args):
    run = make(*args)
    return lambda *args: (time.sleep(0.3), run(*args))[1]
feed.make = slow
images = tuple(np.load(file, mmap_mode="r") for file in sys.argv[3:])
loop.train(configs.from_dict(json.loads(sys.argv[1])), sys.argv[2], images=images)
"""


@pytest.mark.usefixtures("no_pictures")
def test_killed_a_run_of_12_bits_ends_in_the_same_bits(twelve_bits, tmp_path):
    broken, paths = tmp_path / "broken", [tmp_path / "train.npy", tmp_path / "test.npy"]
    for path, array in zip(paths, twelve_bits.images, strict=True):
        np.save(path, array)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, twelve_bits.config.to_json(), str(broken), *map(str, paths)],
        cwd=command_line.ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for expected in range(1, 5):
        line = process.stderr.readline()
        assert line.startswith(f"step {expected}/6") or "eval" in line, line
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "result.json").exists()
    assert (broken / "checkpoints").is_dir()
    again = loop.train(twelve_bits.config, broken, images=twelve_bits.images)
    assert again["metrics"] == twelve_bits.result["metrics"]
    assert_same_run(broken, twelve_bits.directory)


# What comes back has the user's units.


def _units(case):
    """The lowest and highest value of the training images, as given or found."""
    return (0.0, 4095.0) if case.images[0].dtype == np.uint16 else (
        float(case.images[0].min()), float(case.images[0].max()),
    )  # fmt: skip


def test_metrics_have_bits_only_where_there_are_levels(floats, twelve_bits):
    metrics = floats.result["metrics"]
    assert set(metrics) == {
        "eval/elbo", "eval/kl", "eval/reconstruction", "eval/sigma",
        *(f"eval/sigma_{i}" for i in range(5)),
    }  # fmt: skip
    assert not [row for row in rows(floats.directory) if "eval/bits_per_dim" in row]
    assert set(twelve_bits.result["metrics"]) == {
        "eval/elbo", "eval/kl", "eval/reconstruction", "eval/sigma", "eval/bits_per_dim",
    }  # fmt: skip
    found = [row["eval/bits_per_dim"] for row in rows(twelve_bits.directory) if "eval/elbo" in row]
    assert len(found) == 2
    assert 0 < found[-1] < 13
    for case in (floats, twelve_bits):
        assert np.isfinite(list(case.result["metrics"].values())).all()
        elbo = [row["train/loss"] for row in rows(case.directory) if "train/loss" in row]
        assert elbo[-1] < elbo[0]


def test_bits_are_of_levels_and_not_of_the_dtype(twelve_bits):
    """The density at the middle of a bin times its width, where 12 bits are fine enough."""
    run, (_, test) = svae_jax.load(twelve_bits.directory), twelve_bits.images
    metrics = twelve_bits.result["metrics"]
    width = 2 / 4095
    nats = metrics["eval/elbo"] + test[0].size * np.log(width)
    bits = -nats / (test[0].size * np.log(2))
    assert metrics["eval/bits_per_dim"] == pytest.approx(bits, abs=0.02)
    assert run.pixels == PixelRange("uint16", 0.0, 4095.0)


def test_a_run_records_its_images(case):
    found = json.loads((case.directory / "data.json").read_text())
    train, test = case.images
    low, high = _units(case)
    assert found["value_range"] == [low, high]
    assert (found["train"]["low"], found["train"]["high"]) == (train.min(), train.max())
    assert (found["train"]["num_images"], found["held_out"]["num_images"]) == (40, 24)
    assert found["train"]["dtype"] == train.dtype.name
    assert found["held_out"]["shape"] == [*test.shape[1:], 1][:3]
    basis = found["channel_basis"]
    if train.dtype == np.uint16:
        assert basis is None
    else:
        pixels = train.reshape(-1, 5).astype(np.float64)
        covariance = np.array(basis) @ np.cov(pixels.T) @ np.array(basis).T
        np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)


def test_images_come_back_in_the_users_units_and_dtype(case):
    train, test = case.images
    run = svae_jax.load(case.directory, images=case.images)
    low, high = _units(case)
    channels = run.config.dataset.channels
    np.testing.assert_array_equal(run.images(), test.reshape(*test.shape[:3], channels))
    np.testing.assert_array_equal(
        run.images("train[3:5]")[..., 0], train.reshape(40, *run.images().shape[1:])[3:5, ..., 0]
    )
    shown = test[:3]
    found = run.reconstruct(shown)
    assert (found.dtype, found.shape) == (test.dtype, (3, *run.images().shape[1:]))
    # By hand: to [-1, 1], through the networks, and back.
    x = jnp.asarray(2 * (np.float64(run.images()[:3]) - low) / (high - low) - 1, jnp.float32)
    params = run.model.apply(run.variables, x, method="encode")
    means = run.model.apply(run.variables, run.model.posterior.mean(params), method="decode")
    by_hand = low + (np.float64(means) + 1) / 2 * (high - low)
    is_integer = test.dtype == np.uint16
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=0.51 if is_integer else 1e-4)
    # One image, or a list of images, is the same.
    for same in (run.reconstruct(shown[0]), run.reconstruct([shown[0], shown[1]])[:1]):
        np.testing.assert_array_equal(same, found[:1])
    a, b = shown[0], shown[1]
    nothing = np.zeros(run.latent_shape[:2], bool)
    np.testing.assert_array_equal(run.edit(a, b, nothing), found[:1])
    np.testing.assert_array_equal(run.edit(a, b, ~nothing), found[1:2])
    for other in (run.sample(3), run.interpolate(a, b, 3), run.decode(np.zeros(run.latent_shape))):
        assert other.dtype == test.dtype
        assert low <= other.min() <= other.max() <= high
    grey = run.display(shown)
    side = test.shape[1]
    assert (grey.dtype, grey.shape) == (np.uint8, (3, side, channels * side, 1))
    expected = np.clip(np.round((np.float64(run.images()[1]) - low) / (high - low) * 255), 0, 255)
    for i in range(channels):
        tile = grey[1, :, i * side : (i + 1) * side, 0].astype(int)
        np.testing.assert_allclose(tile, expected[..., i], atol=1)


def test_images_of_other_units_are_refused(case):
    run = svae_jax.load(case.directory)
    test = case.images[1]
    other, wanted = (
        (np.uint8(test[:1] // 16), "must be uint16")
        if test.dtype == np.uint16
        else (np.uint8(test[:1].clip(0)), "must be floats")
    )
    for images, message in (
        (other, wanted),
        (test[:1, :-1], "is not that of this model's images"),
        ([str(case.directory)], "give arrays of these, not pictures"),
        (np.where(test[:1] > 0, np.nan, 0.0), "NaN|must be uint16"),
    ):
        with pytest.raises(UserError, match=message):
            run.reconstruct(images)


def test_any_float_is_taken_by_a_run_of_floats(floats):
    run, test = svae_jax.load(floats.directory), floats.images[1]
    expected = run.reconstruct(test[:2])
    found = run.reconstruct(test[:2].astype(np.float64))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_without_its_arrays_a_run_does_all_but_show_them(case):
    run, whole = svae_jax.load(case.directory), svae_jax.load(case.directory, images=case.images)
    test = case.images[1]
    np.testing.assert_array_equal(run.reconstruct(test[:2]), whole.reconstruct(test[:2]))
    np.testing.assert_array_equal(run.sample(2, seed=3), whole.sample(2, seed=3))
    np.testing.assert_array_equal(run.scale, whole.scale)
    with pytest.raises(UserError, match=r"'arrays' are arrays from Python: give them as images="):
        run.images()


def test_the_scale_of_evaluation_is_kept_with_the_checkpoint(case):
    run = svae_jax.load(case.directory)
    recipe = configs.recipe(case.config, case.config.num_steps, run.model)
    train = data.load_of(
        case.config.dataset.to_dict(),
        {"train": case.images[0].reshape(40, *recipe.image_shape)},
        "train",
    )
    scale = bounds.calibrate(recipe, run.variables, train, sharding.make_mesh())
    assert scale.shape == run.model.likelihood.scale_shape
    np.testing.assert_array_equal(run.scale, scale)


def test_a_checkpoint_that_was_not_evaluated_has_no_scale(floats, tmp_path):
    copy = shutil.copytree(floats.directory, tmp_path / "run")
    for number in (5, 6):
        shutil.rmtree(copy / "checkpoints" / str(number))
    run = svae_jax.load(copy)
    assert (run.step, run.scale) == (4, None)


def test_exports_have_the_users_dtype(case, tmp_path):
    drawing.sample(case.directory, "prior", tmp_path / "a.npz", "npz", num=3)
    exported = np.load(tmp_path / "a.npz")["arr_0"]
    run = svae_jax.load(case.directory)
    assert exported.dtype == case.images[0].dtype
    atol = 1 if exported.dtype == np.uint16 else 1e-4  # of another size of batches
    np.testing.assert_allclose(
        exported.astype(float), run.sample(3).astype(float), rtol=0, atol=atol
    )
    assert (tmp_path / "a.png").exists()
    with pytest.raises(UserError, match=r"--format=png holds 8-bit images.*use --format=npz"):
        drawing.sample(case.directory, "prior", tmp_path / "b", "png", num=3)
    picture = tmp_path / "given.png"
    Image.new("L", (64, 64)).save(picture)
    with pytest.raises(UserError, match="--reconstruct: this run is of"):
        drawing.reconstruct(case.directory, [picture], tmp_path / "c.npz", "npz")


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A function that fits a sampler to a copy of a run and evaluates it, once for each run."""
    known = {}

    def study(case):
        if case.directory not in known:
            copy = shutil.copytree(case.directory, tmp_path_factory.mktemp("studied") / "run")
            fitted = fitting.fit(copy, "gaussian", sampler_config.base(), images=case.images)
            settings = evaluating.Settings(importance_samples=2, num_samples=20)
            with pytest.MonkeyPatch.context() as patch:  # nothing that takes long
                patch.setattr(wasserstein, "NUM_DIRECTIONS", 16)
                patch.setattr(wasserstein, "PATCHES_PER_IMAGE", 8)
                patch.setattr(linear, "MAX_DIMS", 256)
                found = evaluating.evaluate(copy, settings, images=case.images)
            known[case.directory] = copy, fitted, found
        return known[case.directory]

    return study


def test_a_sampler_is_fitted_to_arrays(case, studied):
    copy, fitted, _ = studied(case)
    run = svae_jax.load(copy)
    assert fitted["step"] == run.step == 6
    drawn = run.sample(4, "gaussian")
    assert drawn.dtype == case.images[0].dtype
    assert not np.array_equal(drawn, run.sample(4))


def test_an_evaluation_of_arrays(case, studied):
    _, _, found = studied(case)
    metrics = case.result["metrics"]
    assert found["bounds"]["elbo"]["value"] == pytest.approx(metrics["eval/elbo"], rel=1e-5)
    assert found["bounds"]["sigma"] == metrics["eval/sigma"]
    assert found["bounds"]["elbo_iw"]["value"] == pytest.approx(metrics["eval/elbo"], rel=1e-2)
    has_bits = case.images[0].dtype == np.uint16
    assert ("bits_per_dim" in found["bounds"]) == has_bits
    assert ("bits_per_dim_iw" in found["bounds"]) == has_bits
    assert found["num_images"] == 24
    assert list(found["samples"]) == [evaluating.FLOOR, "prior", "gaussian"]
    assert ("prior" in found["parameters"]) == (not has_bits)
    assert 0 < found["reconstruction"]["mse"]["value"] < 4


def test_a_report_of_arrays(case, studied, tmp_path):
    copy, _, _ = studied(case)
    run = svae_jax.load(copy, images=case.images)
    text = page.write([run], tmp_path / "report.html").read_text()
    assert "arrays" in text
    assert text.count("data:image/png") >= 8
    assert ("bits/dim" in text) == (case.images[0].dtype == np.uint16)
    assert "NaN" not in re.sub("base64,[^'\"]*", "", text)


def test_what_needs_the_arrays_says_so(floats, tmp_path):
    copy = shutil.copytree(floats.directory, tmp_path / "run")
    for call in (
        lambda: page.write([copy], tmp_path / "report.html"),
        lambda: evaluating.evaluate(copy, evaluating.Settings()),
        lambda: fitting.fit(copy, "gaussian", sampler_config.base()),
    ):
        with pytest.raises(UserError, match="give them as images=") as error:
            call()
        assert "\n" not in str(error.value)


# Other images are refused, by name.


def _changed(array):
    other = array.copy()
    other[-1, 2, 1] += 1
    return other


OTHERS = {
    "value": (lambda train, test: (_changed(train), test), r"dataset.split: 40 of {kind}, SHA-256"),
    "held out": (lambda train, test: (train, _changed(test)), r"dataset.eval_split: 24 of {kind}"),
    "fifth": (lambda train, test: (train[:32], test), r"dataset.split: 32 of {kind}.*was 40 of"),
    "order": (lambda train, test: (train[::-1], test), r"dataset.split: 40 of {kind}"),
    "dtype": (
        lambda train, test: (train.astype("f8"), test.astype("f8")),
        r"dataset.split: 40 of float64.*dataset.eval_split: 24 of float64",
    ),
}


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_run_refuses_other_arrays(case, change, message):
    kind = {"float32": "float32[16, 16, 5]", "uint16": "uint16[64, 64, 1]"}
    message = message.replace("{kind}", re.escape(kind[case.images[0].dtype.name]))
    before = (case.directory / "data.json").read_bytes()
    images = change(*case.images)
    found = refused(message, case.config, case.directory, images=images)
    assert found.startswith(f"--workdir={case.directory}: its run is of other images: ")
    assert "Choose another --workdir" in found
    with pytest.raises(UserError, match=message):
        svae_jax.load(case.directory, images=images)
    assert (case.directory / "data.json").read_bytes() == before


@pytest.mark.usefixtures("nothing_compiled")
def test_a_run_goes_on_with_its_own_images(case):
    """In another place of memory, another layout, and with the loaded configuration."""
    again = tuple(np.asfortranarray(array) for array in case.images)
    assert loop.train(case.config, case.directory, images=again) == case.result
    config = svae_jax.load(case.directory).config
    assert loop.train(config, case.directory, images=case.images) == case.result


@pytest.mark.usefixtures("nothing_compiled")
def test_a_run_refuses_another_folder_and_takes_a_moved_one(folder_run, tiny_images, tmp_path):
    directory, config = folder_run
    config = config.copy_and_resolve_references()
    moved = shutil.copytree(tiny_images, tmp_path / "moved")
    config.dataset.data_dir = str(moved)
    assert loop.train(config, directory)["step"] == 6
    file = moved / "test" / "003.png"
    pixels = np.array(Image.open(file))
    pixels[4, 4, 1] ^= 1
    Image.fromarray(pixels).save(file)
    refused(r"dataset.eval_split: 20 of uint8\[8, 8, 3\], SHA", config, directory)
    shutil.copy(tiny_images / "test" / "003.png", file)
    for number in range(10):
        (moved / "train" / f"{number:03d}.png").unlink()
    found = refused(r"dataset.split: 38 of uint8\[8, 8, 3\].*was 48 of", config, directory)
    assert "dataset.eval_split" not in found


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_an_older_version_resumes(folder_run, tmp_path, monkeypatch):
    """Without data.json, and without the fields and the order that there were not."""
    _, config = folder_run
    whole = tmp_path / "whole"
    new = ("dataset.value_range", "dataset.flip", "latent.prior", "objective.likelihood")
    new = (*new, "latent.nu_scale", "latent.lower_scale")

    def without(fields):
        old = json.loads(json.dumps(fields))
        for name in new:
            section, field = name.split(".")
            del old[section][field]
        return old

    save, old = Checkpointer.save, tmp_path / "old"
    with monkeypatch.context() as patch:
        patch.setattr(data, "MIXED", data.BY_PATH)
        loop.train(config, whole)
        interrupt_after(patch, 4)
        patch.setattr(
            Checkpointer,
            "save",
            lambda self, *args, config, **kwargs: save(
                self, *args, config=without(config), **kwargs
            ),
        )
        with pytest.raises(Interrupted):
            loop.train(config, old)
    (old / "data.json").unlink()
    fields = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(without(fields)))
    assert svae_jax.load(old).pixels == PixelRange()
    loop.train(config, old)
    assert_same_run(old, whole)
    assert json.loads((old / "data.json").read_text())["train"]["num_images"] == 48


# Configurations that say otherwise.


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset.width": 16}, r"dataset.width=16, but the images are \[8, 8, 3\]; set"),
        (
            {"dataset.channels": 1},
            r"dataset.channels=1, but the images are \[8, 8, 3\]; set it to 3",
        ),
        ({"dataset.eval_split": "validation"}, r"'validation'.*train \(16 .*test \(16 images"),
        ({"dataset.value_range": "0,100"}, "dataset.value_range=0,100: the training split has"),
        ({"dataset.value_range": "0"}, "dataset.value_range='0' must be LOW,HIGH"),
        ({"batch_size": 100}, "batch_size=100 is above the 16 images"),
        ({"latent.prior": "flat"}, "latent.*standard, tensor_normal, matrix_normal.*'flat'"),
        ({"objective.likelihood": "student"}, "objective.likelihood must be one of gaussian, "),
        ({"objective.likelihood": "bernoulli"}, "likelihood='bernoulli' .* got 0,255; set dataset"),
        ({"objective.likelihood": "discretized_logistic"}, "objective.sigma must be 'learned' or"),
        (
            {"objective.scaling": "released_code", "objective.likelihood": "laplace"},
            "objective.likelihood=laplace cannot be combined with scaling='released_code'",
        ),
        (
            {"objective.scaling": "released_code", "objective.sigma": "learned"},
            "objective.sigma=learned cannot be combined with scaling='released_code'",
        ),
        (
            {"objective.scaling": "released_code", "latent.prior": "tensor_normal"},
            "objective.scaling=released_code goes with latent.prior='standard' alone, got 'tensor_",
        ),
        (
            {"objective.free_bits": 0.5, "latent.prior": "matrix_normal"},
            "objective.free_bits=0.5 goes with latent.prior='standard' alone, got 'matrix_normal'",
        ),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_configuration_that_does_not_go_with_the_arrays_is_refused(tmp_path, changed, message):
    levels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    refused(message, small(8, **changed), tmp_path, images=(levels, levels))
    assert not workdir.has_begun(tmp_path)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("shape", "dtype", "changed", "message"),
    [
        (
            (16, 8, 8, 1),
            "float32",
            {"objective.likelihood": "discretized_logistic", "objective.sigma": "learned"},
            "likelihood='discretized_logistic' is of images of integers, got float32",
        ),
        ((16, 9, 9, 1), "uint8", {"objective.likelihood": "gaussian_blocks"}, "even.*got 9x9"),
        ((16, 8, 8, 1), "float32", {"objective.likelihood": "bernoulli"}, "bernoulli.*range 0,1"),
    ],
)
def test_arrays_that_do_not_go_with_a_configuration_are_refused(
    tmp_path, shape, dtype, changed, message
):
    images = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    refused(message, small(8, **changed), tmp_path, images=(images, images))


@pytest.mark.usefixtures("nothing_compiled")
def test_arrays_are_named_and_not_given(tmp_path):
    changed = {
        "dataset.name": "arrays",
        "dataset.height": 8,
        "dataset.width": 8,
        "dataset.channels": 5,
    }
    refused("give them as images=", small(8, **changed), tmp_path)
    refused("dataset.height must be at least 1, got 0", small(8), tmp_path)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_and_found(tmp_path, floats, bad):
    train, test = floats.images
    train = train.copy()
    train[7, 5, 3, 2] = bad
    message = r"1 values of the training split are NaN or infinite, first at \[7, 5, 3, 2\]"
    refused(message, floats.config, tmp_path, images=(train, test))


# Flips.


def _flip_recipe(**changed):
    config = small(
        8, **{"dataset.flip": True, "dataset.height": 8, "dataset.width": 8, "dataset.channels": 3}
    )
    config.update_from_flattened_dict(changed)
    return configs.recipe(config, 6)


def test_about_half_of_the_images_are_mirrored_and_the_others_stay():
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4000, 2, 3, 2)), jnp.float32)
    flipped = step._flip(jax.random.key(0), images)
    mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(flipped == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_flips_are_a_function_of_seed_and_step_alone(monkeypatch):
    keys = []
    monkeypatch.setattr(step, "_flip", lambda key, x: (keys.append(jax.random.key_data(key)), x)[1])

    def key_of(recipe, at):
        """What decides the flips of a step; the rest of the step is traced and not computed."""
        shapes = jax.eval_shape(lambda: step.init_state(recipe))

        def trace(at):
            state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            step.train_step(recipe, state._replace(step=at), jnp.zeros((8, 8, 8, 3), jnp.uint8))
            return keys.pop() if keys else None

        return jax.jit(trace)(at)

    for seed, at in ((0, 3), (0, 4), (1, 3)):
        expected = jax.random.fold_in(recipe_lib.stream(seed, "flip"), at)
        found = key_of(_flip_recipe(seed=seed), at)
        np.testing.assert_array_equal(found, jax.random.key_data(expected))
    assert key_of(_flip_recipe(**{"dataset.flip": False}), 3) is None


@pytest.mark.usefixtures("no_pictures")
def test_flipped_runs_resume_to_the_same_bits_and_symmetric_images_do_not_notice(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(bounds, "held_out", lambda *args, **kwargs: {"elbo": -1.0})
    half = np.random.default_rng(0).integers(0, 256, (24, 8, 4, 3)).astype(np.uint8)
    symmetric = np.concatenate([half, half[:, :, ::-1]], axis=2)
    images = np.concatenate([half, half], axis=2)
    on, off = small(8, **{"dataset.flip": True}), small(8)

    def train(name, config, images):
        loop.train(config, tmp_path / name, images=(images, images))
        return fingerprint(tmp_path / name)

    whole = train("whole", on, images)
    assert whole != train("off", off, images)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            train("broken", on, images)
    assert train("broken", on, images) == whole
    # No other random number changes; two programs may round differently.
    names = ("symmetric", "symmetric off")
    for name, config in zip(names, (on, off), strict=True):
        train(name, config, symmetric)
    one, other = (checkpoint.load(tmp_path / name / "checkpoints").state for name in names)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), one, other)


# Every row of the tables.

EVERY = [
    ("gaussian", "optimal", "standard", "mvn"),
    ("gaussian_channels", "optimal", "tensor_normal", "mvn_full"),
    ("gaussian_blocks", "learned", "matrix_normal", "mvn"),
    ("laplace", "learned", "standard", "mvn_full"),
    ("discretized_logistic", "learned", "tensor_normal", "mvn"),
    ("bernoulli", "optimal", "matrix_normal", "mvn_full"),
    ("gaussian", "optimal", "autoregressive", "mvn_full"),
    ("gaussian_blocks", "learned", "autoregressive", "mvn"),
]
OTHER_PAIRS = [
    (likelihood, "optimal" if likelihood == "bernoulli" else "learned", prior, posterior)
    for likelihood, prior, posterior in itertools.product(
        likelihoods.names(), latents.prior_names(), ("mvn", "mvn_full")
    )
    if (likelihood, prior, posterior) not in [(a, c, d) for a, _, c, d in EVERY]
]


def test_every_row_of_the_tables_is_here():
    assert {row[0] for row in EVERY} == set(likelihoods.names())
    assert {row[2:] for row in EVERY} == {
        *itertools.product(latents.prior_names(), ("mvn", "mvn_full"))
    }


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("likelihood", "sigma", "prior", "posterior"),
    [*EVERY, *(pytest.param(*row, marks=pytest.mark.slow) for row in OTHER_PAIRS)],
)
def test_every_likelihood_and_prior_trains(tmp_path, likelihood, sigma, prior, posterior):
    rng = np.random.default_rng(0)
    is_binary = likelihood == "bernoulli"
    levels = (255 * blobs(rng, 32, 8, 2)).astype(np.uint8)
    levels = levels // 128 if is_binary else levels
    changed = {
        "latent.name": posterior,
        "latent.prior": prior,
        "objective.likelihood": likelihood,
        "objective.sigma": sigma,
        "dataset.value_range": "0,1" if is_binary else "",
        "optimizer.ema_decay": 0.5,
        "num_steps": 3,
    }
    config = small(8, **changed)
    result = loop.train(config, tmp_path, images=(levels[:16], levels[16:]))
    found = [row for row in rows(tmp_path) if "train/loss" in row]
    assert len(found) == 3
    assert all(np.isfinite(list(row.values())).all() for row in found)
    metrics = result["metrics"]
    assert np.isfinite(list(metrics.values())).all()
    assert ("eval/sigma" in metrics) == ("train/sigma" in found[0]) == (not is_binary)
    assert "eval/bits_per_dim" in metrics
    assert ("prior" in result["parameters"]) == (prior != "standard")
    assert ("eval/sigma_0" in metrics) == (likelihood in ("gaussian_channels", "gaussian_blocks"))

    # What is learned is in the checkpoints, and EMA averages it.
    states = []
    for number in (2, 3):
        alone = tmp_path / f"alone_{number}"
        shutil.copytree(tmp_path / "checkpoints" / str(number), alone / str(number))
        states.append(checkpoint.load(alone).state["state"])
    before, after = states
    own = {"prior"} if prior != "standard" else set()
    own |= {"log_sigma"} if sigma == "learned" else set()
    assert set(after["params"]) == {"encoder", "decoder", *own}
    weight = 1 - min(0.5, 3 / 12)
    for name in own:
        averages = jax.tree.map(
            lambda old, new: old + weight * (new - old),
            before["ema"]["params"][name],
            after["params"][name],
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
            averages,
            after["ema"]["params"][name],
        )
        moved = [np.abs(leaf).max() for leaf in jax.tree.leaves(after["params"][name])]
        assert min(moved) > 0

    # A run that is loaded evaluates and draws with what was learned.
    run = svae_jax.load(tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal, dict(run.variables["params"]), after["ema"]["params"]
    )
    recipe = configs.recipe(config, 3, run.model)
    scale = bounds.calibrate(recipe, run.variables, levels[:16], sharding.make_mesh())
    np.testing.assert_array_equal(run.scale, scale)


# A learned prior, on any number of devices.

DEVICES = """
import json, sys
import jax
import numpy as np
from svae_jax import config as configs
from svae_jax.devices import sharding
from svae_jax.training import feed, step
from svae_jax.training.metrics import TrainMetrics
config = configs.from_dict(json.loads(sys.argv[1]))
recipe = configs.recipe(config, 20)
pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
assert jax.device_count() == 8
for count in (1, 4, 8):
    mesh = sharding.make_mesh(jax.devices()[:count])
    state, empty = jax.jit(
        lambda: (step.init_state(recipe), TrainMetrics.empty()),
        out_shardings=sharding.replicated(mesh),
    )()
    run = feed.make(recipe, pixels, mesh, 0.5)
    losses = []
    for at in range(20):
        state, metrics, _ = run(state, empty, at, 1)
        losses.append(float(metrics.compute()["loss"]))
    prior = jax.tree.map(lambda leaf: np.asarray(leaf).ravel().tolist(), state.params["prior"])
    print(json.dumps([count, losses, prior]))
"""


def test_a_learned_prior_is_the_same_on_any_number_of_devices():
    changed = {
        "latent.name": "mvn_full",
        "latent.prior": "tensor_normal",
        "dataset.height": 8,
        "dataset.width": 8,
        "dataset.channels": 3,
        "batch_size": 16,
    }
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, small(8, **changed).to_json()],
        cwd=command_line.ROOT, env=os.environ | command_line.host_devices(8),
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    (one, losses, prior), *others = map(json.loads, done.stdout.splitlines())
    assert [one, *(count for count, *_ in others)] == [1, 4, 8]
    assert set(prior) == {"mean", "rows", "cols", "maps"}
    assert min(np.abs(leaf).max() for leaf in prior.values()) > 1e-3  # it has learned something
    for _, others_losses, others_prior in others:
        np.testing.assert_allclose(others_losses, losses, rtol=1e-5)
        for name, leaf in prior.items():
            np.testing.assert_allclose(others_prior[name], leaf, atol=1e-5)


# Nothing but training is compared, and the rest takes long to compile.
ALONE = """
from svae_jax.evaluation import bounds, previews
bounds.held_out = lambda *args: {"elbo": -1.0}
previews.draw = lambda *args: {}
"""


@pytest.mark.usefixtures("no_pictures")
def test_a_learned_prior_is_the_same_on_two_processes(
    start, tiny_images, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr(bounds, "held_out", lambda *args: {"elbo": -1.0})
    changed = {"latent.name": "mvn_full", "latent.prior": "tensor_normal", "num_steps": 12}
    changed |= {"model.linear": "pca"}  # one process fits it, and gives it to the other
    config = of_folder(tiny_images, tmp_path_factory, **changed)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pair = [
        start(
            *command_line.arguments(config, tmp_path / "pair"),
            f"--distributed=localhost:{port},2,{rank}",
            before=ALONE,
            **command_line.host_devices(1),
        )
        for rank in range(2)
    ]
    loop.train(config, tmp_path / "alone")  # meanwhile
    outputs = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    ours, theirs = rows(tmp_path / "pair"), rows(tmp_path / "alone")
    assert len(ours) >= 12
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    states = [checkpoint.load(tmp_path / name / "checkpoints").state for name in ("pair", "alone")]
    priors = [state["state"]["params"]["prior"] for state in states]
    assert set(priors[0]) == {"mean", "rows", "cols", "maps"}
    assert min(np.abs(leaf).max() for leaf in priors[0].values()) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *priors)
    result = json.loads((tmp_path / "pair" / "result.json").read_text())
    assert (result["device"]["count"], result["device"]["processes"]) == (2, 2)
