"""One file of a trained model: what comes back, how much is lost, and what is refused."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

import svae_jax
from svae_jax.analysis import evaluating, packing, pretrained
from svae_jax.data.sources import shapes
from svae_jax.errors import UserError
from svae_jax.training import loop
from tests import tiny


@pytest.fixture(scope="module")
def packed(trained_run, tmp_path_factory):
    return packing.pack(trained_run, tmp_path_factory.mktemp("packed") / "tiny.npz")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pairs(after, before):
    """The arrays of two runs, one beside the other."""
    leaves = (jax.tree.leaves(run.variables) for run in (after, before))
    return list(zip(*leaves, strict=True))


def test_what_comes_back_is_the_run(trained_run, packed, tiny_images):
    before, after = svae_jax.load(trained_run), svae_jax.pretrained(packed)
    assert after.step == before.step
    assert after.record == before.record
    assert after.metrics() == before.metrics()
    assert after.samplers == before.samplers == ["prior", "gaussian"]
    # The arrays of so small a model are all below the size that is rounded.
    for found, wanted in pairs(after, before):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(after.sample(3, "gaussian"), before.sample(3, "gaussian"))
    assert after.scale == before.scale


def test_large_arrays_are_rounded_to_float16_and_no_further(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_LARGE", 64)
    before = svae_jax.load(trained_run)
    after = svae_jax.pretrained(packing.pack(trained_run, tmp_path / "half.npz"))
    rounded = 0
    for found, wanted in pairs(after, before):
        assert found.dtype == wanted.dtype
        if wanted.size >= 64:
            np.testing.assert_array_equal(found, wanted.astype(np.float16).astype(np.float32))
            rounded += 1
        else:
            np.testing.assert_array_equal(found, wanted)
    assert rounded
    assert after.sample(2, "gaussian").shape == (2, 8, 8, 3)  # the sampler is the rounded model's


def test_the_file_names_no_place_and_holds_no_optimizer(packed, tiny_images):
    with np.load(packed) as file:
        about = file["about"].tobytes().decode()
        assert str(tiny_images) not in about
        assert json.loads(about)["config"]["dataset"]["data_dir"] == ""
        assert {name.partition("/")[0] for name in file} == {"about", "model", "samplers"}


def test_the_other_commands_read_an_unpacked_run(packed, tiny_images, tmp_path):
    packing.unpack(packed, tmp_path / "run")
    settings = evaluating.Settings(importance_samples=1, num_samples=20)
    found = evaluating.evaluate(tmp_path / "run", settings, data_dir=str(tiny_images))
    assert set(found["samples"]) >= {"prior", "gaussian"}


def test_moving_averages_stand_for_the_parameters(tiny_images, tmp_path):
    config = tiny.config(tiny_images, tmp_path / "images")
    config.update(num_steps=2)
    config.optimizer.ema_decay = 0.5
    loop.train(config, tmp_path / "run")
    after = svae_jax.pretrained(packing.pack(tmp_path / "run", tmp_path / "ema.npz"))
    wanted = svae_jax.load(tmp_path / "run").variables
    jax.tree.map(np.testing.assert_array_equal, after.variables, wanted)


def test_training_does_not_go_on_without_the_optimizer(packed, tiny_images, tmp_path):
    packing.unpack(packed, tmp_path / "run")
    config = svae_jax.load(tmp_path / "run").config
    config.dataset.data_dir = str(tiny_images)
    with pytest.raises(UserError, match="was unpacked from a file without the optimizer"):
        loop.train(config, tmp_path / "run")


def test_a_damaged_file_is_refused(packed, tmp_path):
    content, rng = packed.read_bytes(), np.random.default_rng(0)
    for position in rng.integers(0, len(content), 150):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.integers(8)
        (tmp_path / "bad.npz").write_bytes(changed)
        # Some bits, such as those of a time, no reader looks at.
        with contextlib.suppress(UserError):
            packing._read(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"bad\.npz is damaged"):
        svae_jax.pretrained(tmp_path / "bad.npz")
    assert not list((tmp_path / "cache").rglob("config.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["samplers"].update({"../outside": about["samplers"]["gaussian"]}),
        lambda about: about["samplers"].update({"/outside": about["samplers"]["gaussian"]}),
        lambda about: about["samplers"].update(prior=about["samplers"]["gaussian"]),
        lambda about: about.update(step=-1),
        lambda about: about.update(step="../3"),
        lambda about: about["dtypes"].update({next(iter(about["dtypes"])): "O"}),
        lambda about: about.pop("rows"),
        lambda about: about["config"].update(unknown=1),
    ],
)
def test_a_crafted_file_is_refused_and_writes_nothing(packed, tmp_path, change):
    with np.load(packed) as file:
        members = dict(file)
    about = json.loads(members["about"].tobytes())
    change(about)
    members["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "crafted.npz", **members)
    with pytest.raises(UserError):
        packing.unpack(tmp_path / "crafted.npz", tmp_path / "a" / "run")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "crafted.npz"]


def test_a_file_of_another_size_or_format_is_refused(packed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_MOST_BYTES", 1000)
        with pytest.raises(UserError, match="more than 1,000 bytes"):
            svae_jax.pretrained(packed)
    monkeypatch.setattr(packing, "_FORMAT", 2)
    with pytest.raises(UserError, match="of format 1, which this version"):
        svae_jax.pretrained(packed)


def test_paths_of_somebody_else_are_not_taken(packed, tmp_path):
    with np.load(packed) as file:
        members = dict(file)
    about = json.loads(members["about"].tobytes())
    about["config"]["dataset"].update(data_dir="/etc", cache_dir="/elsewhere")
    members["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "theirs.npz", **members)
    dataset = svae_jax.pretrained(tmp_path / "theirs.npz").config.dataset
    assert dataset.data_dir == dataset.cache_dir == ""


def test_a_cache_that_lost_a_part_is_unpacked_again(packed):
    run = svae_jax.pretrained(packed)
    shutil.rmtree(run.directory / "checkpoints")
    assert svae_jax.pretrained(packed).step == run.step


def test_a_cache_that_cannot_be_written_is_told_with_its_cure(packed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: .*XDG_CACHE_HOME"):
        svae_jax.pretrained(packed)


def test_values_beyond_float16_are_refused(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_LARGE", 1)
    with pytest.raises(UserError, match="too large for float16"):
        packing._rounded("x", np.array([1e6], np.float32))
    with pytest.raises(UserError, match="not finite"):
        packing._rounded("x", np.array([np.nan], np.float32))


def test_mistakes_are_told_in_one_line(trained_run, packed, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no pretrained model circles; choose"):
        svae_jax.pretrained("circles")
    with pytest.raises(UserError, match="cannot be read"):
        svae_jax.pretrained(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="is not a file of"):
        svae_jax.pretrained(tmp_path / "other.npz")
    with pytest.raises(UserError, match="must end with"):
        packing.pack(trained_run, tmp_path / "model.zip")
    with pytest.raises(UserError, match="not the workdir of a run"):
        packing.pack(tmp_path, tmp_path / "model.npz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="mine cannot be written"):
        packing.unpack(packed, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not list(tmp_path.glob(".mine*"))


# Held-out ELBO in nats: those of README.md and of experiments/measurements.md.
ELBOS = {"shapes": 4266.0, "shapes_vector": 2869.9, "cifar10": 5485.8}


@pytest.mark.parametrize("name", pretrained.MODELS)
def test_what_is_shipped_is_what_the_pages_say(name):
    run = svae_jax.pretrained(name)
    assert pretrained.file(name).stat().st_size < 8e6
    assert run.metrics()[-1]["eval/elbo"] == pytest.approx(ELBOS[name], abs=0.1)
    assert run.sample(2).shape == (2, 32, 32, 3)


@pytest.mark.usefixtures("optimised")  # it is of real size
def test_the_shapes_that_are_shipped_reconstruct():
    run = svae_jax.pretrained("shapes")
    scenes = np.array([shapes.scene("test", i)[0] for i in range(50)])  # nothing to prepare
    error = np.mean((run.reconstruct(scenes).astype(float) - scenes) ** 2)
    assert 35 < 10 * np.log10(255**2 / error) < 45  # dB


def test_a_shipped_file_that_was_changed_is_refused(packed, monkeypatch):
    monkeypatch.setattr(pretrained, "_FOLDER", packed.parent)
    monkeypatch.setattr(pretrained, "MODELS", {"tiny": "0" * 64})
    with pytest.raises(UserError, match="not the file that was shipped"):
        svae_jax.pretrained("tiny")
