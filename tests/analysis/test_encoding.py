"""`encoding`: the posteriors of a whole split, as a file."""

from types import SimpleNamespace

import numpy as np
import pytest

import svae_jax
from svae_jax import files
from svae_jax.analysis import encoding
from svae_jax.errors import UserError


def test_a_split_is_encoded_in_order_whatever_the_batches(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH", 7)
    run = svae_jax.load(trained_run)
    wanted = run.encode(run.images("test"))
    path = encoding.write(trained_run, tmp_path / "new" / "a.npz", "test")
    with np.load(path) as archive:
        assert sorted(archive) == ["mean", "stddev"]
        for name in archive:
            assert archive[name].dtype == np.float32
            np.testing.assert_allclose(archive[name], getattr(wanted, name), rtol=1e-5, atol=1e-6)
    means = np.load(encoding.write(trained_run, tmp_path / "a.npy", "test[5:]"), mmap_mode="r")
    np.testing.assert_allclose(means, wanted.mean[5:], rtol=1e-5, atol=1e-6)


def test_the_training_images_are_encoded_by_default(trained_run, tiny_images, tmp_path):
    path = encoding.write(trained_run, tmp_path / "a.npy", data_dir=tiny_images)
    assert np.load(path).shape == (48, 3, 3, 4)


BAD = {
    "suffix": ({"out": "a.pt"}, r"a\.pt must end in \.npz or \.npy"),
    "exists": ({"out": "there.npz"}, r"there\.npz exists"),
    "split": ({"split": "birds"}, "'birds'"),
    "data": ({"data_dir": "/nowhere"}, "its data set folder is not in /nowhere"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_one_line_and_write_nothing(trained_run, tmp_path, changed, message):
    (tmp_path / "there.npz").touch()
    arguments = {"out": "a.npz"} | changed
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(UserError, match=message) as error:
        encoding.write(trained_run, **arguments)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]


@pytest.mark.parametrize(("name", "arrays"), [("a.npz", 2.5), ("a.npy", 0.5)])
def test_a_disk_without_room_is_told_before_the_work(
    trained_run, tmp_path, monkeypatch, name, arrays
):
    free = arrays * 48 * 3 * 3 * 4 * 4  # 48 latents of 3 x 3 x 4, float32
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(encoding.batches, "over", None)
    with pytest.raises(UserError, match=rf"{name} cannot be written: it takes .* MB are free"):
        encoding.write(trained_run, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_file_that_was_not_finished(trained_run, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError

    monkeypatch.setattr(encoding, "_posteriors", fail)
    with pytest.raises(KeyError):
        encoding.write(trained_run, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
