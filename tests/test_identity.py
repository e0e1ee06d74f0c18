"""A run knows its images and its configuration, wherever they lie."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import svae_jax
from svae_jax import data, identity, sampler_config
from svae_jax.analysis import evaluating, fitting
from svae_jax.analysis.report import page
from svae_jax.devices import runtime
from svae_jax.errors import UserError
from svae_jax.training import loop

QUICK = evaluating.Settings(importance_samples=1, num_samples=20)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 24 training and 20 held-out pictures, and another with other pixels."""
    root = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("cats", "dogs")):
        rng = np.random.default_rng(number)
        for split, count in (("train", 24), ("test", 20)):
            (root / name / split).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / split / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def begun(pictures, tmp_path_factory):
    """A finished run of the cats, which nobody changes."""
    from tests import tiny

    config = tiny.config(pictures / "cats", tmp_path_factory.mktemp("cache"))
    config.num_steps = 2
    directory = tmp_path_factory.mktemp("runs") / "cats"
    loop.train(config, directory)
    return config, directory


@pytest.fixture
def run(begun, pictures, tmp_path):
    """The configuration and the workdir of a run of cats; both may be moved and changed."""
    config, directory = begun
    config = config.copy_and_resolve_references()
    shutil.copytree(pictures / "cats", tmp_path / "cats")
    shutil.copytree(directory, tmp_path / "run")
    config.dataset.data_dir = str(tmp_path / "cats")
    fields = json.loads((tmp_path / "run" / "config.json").read_text())
    fields["dataset"]["data_dir"] = str(tmp_path / "cats")
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields))
    return config, tmp_path / "run"


def stored(directory):
    return json.loads((directory / "config.json").read_text())["dataset"]


def readers(directory, **place):
    """What reads a workdir and its data."""
    yield lambda: svae_jax.load(directory, **place).images()
    yield lambda: svae_jax.load(directory, **place).images("train[:2]")
    yield lambda: evaluating.evaluate(directory, QUICK, **place)
    yield lambda: fitting.fit(directory, "gaussian", sampler_config.base(), **place)
    yield lambda: page.write([directory], directory.parent / "page.html", **place)


# Which images.


@pytest.mark.parametrize("more", [0, 2], ids=["finished", "more steps"])
def test_other_pictures_are_refused(run, pictures, more):
    config, directory = run
    config.num_steps += more
    config.dataset.data_dir = str(pictures / "dogs")
    before = (directory / "result.json").read_bytes(), stored(directory)
    with pytest.raises(UserError, match=r"other images: dataset\.split: 24 .*SHA-256 \w+ \(was"):
        loop.train(config, directory)
    assert before == ((directory / "result.json").read_bytes(), stored(directory))


def test_fewer_pictures_are_refused(run, tmp_path):
    config, directory = run
    (tmp_path / "cats" / "train" / "3.png").unlink()
    with pytest.raises(UserError, match=r"dataset\.split: 23 .* \(was 24"):
        loop.train(config, directory)


def test_readers_refuse_other_pictures(run, pictures):
    _, directory = run
    for read in readers(directory, data_dir=pictures / "dogs"):
        with pytest.raises(UserError, match=rf"^{directory}: its run is of other images"):
            read()


# Where they are.


def test_a_set_that_has_moved_is_the_same(run, tmp_path):
    config, directory = run
    (tmp_path / "cats").rename(tmp_path / "moved")
    for read in readers(directory):
        with pytest.raises(UserError, match=r"not in .*cats; .*--data_dir=DIR"):
            read()
    for read in readers(directory, data_dir=tmp_path / "moved"):
        read()
    assert stored(directory)["data_dir"] == str(tmp_path / "cats")  # they only read
    config.dataset.data_dir = str(tmp_path / "moved")
    loop.train(config, directory)  # is finished, and keeps the place
    assert stored(directory)["data_dir"] == str(tmp_path / "moved")
    assert len(svae_jax.load(directory).images()) == 20
    config.dataset.data_dir = str(tmp_path / "cats")  # as the script of the first run says
    config.num_steps = 4
    assert loop.train(config, directory)["step"] == 4
    assert stored(directory)["data_dir"] == str(tmp_path / "moved")


def test_relative_places_are_stored_as_absolute_ones(begun, pictures, tmp_path, monkeypatch):
    config = begun[0].copy_and_resolve_references()
    monkeypatch.chdir(pictures)
    config.dataset.data_dir, config.dataset.cache_dir = "cats", "../cache of " + tmp_path.name
    loop.train(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert Path(stored(tmp_path / "run")["data_dir"]) == pictures / "cats"
    run = svae_jax.load("run")
    monkeypatch.chdir("/")
    assert len(run.images()) == 20
    assert run.metrics()


def test_a_set_of_tfds_is_searched_and_never_downloaded(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    from svae_jax.data.sources import tfds as source

    def download(*args, **kwargs):
        raise AssertionError("downloaded")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)
    prepared = tmp_path / "prepared"
    monkeypatch.setattr(source, "is_prepared", lambda name, place: place == str(prepared))
    assert data.locate("mnist", [str(tmp_path), str(prepared)]) == str(prepared)
    assert data.locate("mnist", [str(tmp_path)]) is None


def test_the_environment_names_the_place_of_tfds(tmp_path, monkeypatch):
    from svae_jax.data.sources import tfds as source

    asked = []
    monkeypatch.setattr(source, "is_prepared", lambda name, place: asked.append(place) or not place)
    assert data.locate("mnist", ["/old"]) == ""  # which is TFDS_DATA_DIR, then TFDS's own
    assert asked == ["/old", ""]
    monkeypatch.undo()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    assert not source.is_prepared("mnist", "")


# Runs of older versions.


def test_an_older_run_keeps_the_order_of_its_pictures(run):
    config, directory = run
    (directory / "data.json").unlink()  # it had none
    by_path = svae_jax.load(directory).images()
    held_out = Path(config.dataset.data_dir) / "test"
    names = sorted(path.name for path in held_out.iterdir())
    wanted = np.stack([np.asarray(Image.open(held_out / name)) for name in names])
    np.testing.assert_array_equal(by_path, wanted)
    config.num_steps = 4
    loop.train(config, directory)
    assert json.loads((directory / "data.json").read_text())["order"] == data.BY_PATH
    np.testing.assert_array_equal(svae_jax.load(directory).images(), by_path)
    config.num_steps = 6
    assert loop.train(config, directory)["step"] == 6


def test_a_record_without_an_order_is_of_an_older_version(run):
    _, directory = run
    fields = json.loads((directory / "data.json").read_text())
    assert fields.pop("order") == data.MIXED
    (directory / "data.json").write_text(json.dumps(fields))
    assert identity.read(directory).order == data.BY_PATH


def test_another_version_is_told_and_refuses_nothing(run, monkeypatch, caplog):
    config, directory = run
    now = runtime.versions()
    monkeypatch.setattr(runtime, "versions", lambda: now | {"svae_jax": "99.0"})
    svae_jax.load(directory)
    loop.train(config, directory)
    told = [r.getMessage() for r in caplog.records if "written by" in r.getMessage()]
    line = f"{directory}: written by svae_jax {now['svae_jax']}; this is svae_jax 99.0"
    assert told == [line, line]


# Held-out images that the model was trained on.


@pytest.mark.parametrize(
    ("split", "eval_split", "shared"),
    [("all", "test", 20), ("all[:50%]", "all[25%:75%]", 11), ("train[:12]", "train[12:]", 0)],
)
def test_an_overlap_is_told(begun, tmp_path, split, eval_split, shared, caplog):
    config = begun[0].copy_and_resolve_references()
    config.dataset.update(split=split, eval_split=eval_split)
    config.num_steps = 1
    loop.train(config, tmp_path)
    told = [r.getMessage() for r in caplog.records if "was trained on" in r.getMessage()]
    assert [line.split()[0] for line in told] == [str(shared)] * (shared > 0)


def test_arrays_that_share_images_are_told(caplog):
    from svae_jax import config as configs

    arrays = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8)
    run = identity.Identity(configs.base(), None)
    identity.warn_overlap(run, {"train": arrays[:20], "test": arrays[20:]}, "test")
    assert not caplog.records
    identity.warn_overlap(run, {"train": arrays[:20], "test": arrays[15:]}, "test")
    assert "5 images of test are in dataset.split='train' too" in caplog.text


# Evaluations.


def test_each_split_has_an_evaluation_of_its_own(run):
    _, directory = run
    splits = ("test[:20]", "test[-20:]", "test+train[:2]")
    for split in splits:
        evaluating.evaluate(directory, QUICK._replace(split=split))
        assert evaluating.read(directory, split)["split"] == split
    assert len(list(directory.glob("evaluation_*.json"))) == 3
    assert [evaluating.read(directory, split)["split"] for split in splits] == [*splits]
    assert evaluating.read(directory, "test[:19]") is None


def test_the_evaluation_of_an_older_version_is_read_for_its_own_split(run):
    _, directory = run
    (directory / "evaluation_test_20_.json").write_text(json.dumps({"split": "test[:20]"}))
    assert evaluating.read(directory, "test[:20]") == {"split": "test[:20]"}
    assert evaluating.read(directory, "test[-20:]") is None
