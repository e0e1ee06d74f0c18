"""One file of a trained model: what comes back, how much is lost, and what is refused."""

import json

import jax
import numpy as np
import pytest

import svae_jax
from svae_jax.analysis import evaluating, packing, pretrained
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
    with pytest.raises(UserError, match="opt_state"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_a_damaged_file_is_refused(packed, tmp_path, at):
    content = bytearray(packed.read_bytes())
    content[int(at * len(content))] ^= 0xFF
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.npz is damaged"):
        svae_jax.pretrained(tmp_path / "bad.npz")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_mistakes_are_told_in_one_line(trained_run, packed, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no pretrained model circles; choose"):
        svae_jax.pretrained("circles")
    with pytest.raises(UserError, match="cannot be read"):
        svae_jax.pretrained(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="is no file of"):
        svae_jax.pretrained(tmp_path / "other.npz")
    with pytest.raises(UserError, match="must end with"):
        packing.pack(trained_run, tmp_path / "model.zip")
    with pytest.raises(UserError, match="no workdir of a run"):
        packing.pack(tmp_path, tmp_path / "model.npz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="mine cannot be written"):
        packing.unpack(packed, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not list(tmp_path.glob(".mine*"))


@pytest.mark.parametrize("name", pretrained.MODELS)
def test_what_is_shipped_opens(name):
    run = svae_jax.pretrained(name)
    path = pretrained.file(name)
    assert path.stat().st_size < 8e6
    assert run.sample(2).shape == (2, 32, 32, 3)


def test_a_shipped_file_that_was_changed_is_refused(packed, monkeypatch):
    monkeypatch.setattr(pretrained, "_FOLDER", packed.parent)
    monkeypatch.setattr(pretrained, "MODELS", {"tiny": "0" * 64})
    with pytest.raises(UserError, match="not the file that was shipped"):
        svae_jax.pretrained("tiny")
