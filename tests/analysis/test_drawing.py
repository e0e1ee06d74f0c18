"""`drawing`: images of a model, or of one's own pictures, as files."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import svae_jax
from svae_jax import pixels as pixel_ops
from svae_jax.analysis import drawing
from svae_jax.errors import UserError
from svae_jax.evaluation import steps


def _read(path):
    with np.load(path) as archive:
        return archive["arr_0"]


def test_more_samples_are_the_same_and_more(trained_run, tmp_path):
    few, many = tmp_path / "few.npz", tmp_path / "many.npz"
    assert drawing.sample(trained_run, "gaussian", few, "npz", num=3) == [few, tmp_path / "few.png"]
    drawing.sample(trained_run, "gaussian", many, "npz", num=260)
    assert _read(many).shape == (260, 8, 8, 3)
    np.testing.assert_array_equal(_read(few), _read(many)[:3])
    assert len(np.unique(_read(many), axis=0)) == 260
    assert Image.open(tmp_path / "few.png").width > 3 * 64


def test_pngs_are_the_same_images(trained_run, tmp_path):
    drawing.sample(trained_run, "prior", tmp_path / "a.npz", "npz", num=3, seed=7)
    drawing.sample(trained_run, "prior", tmp_path / "folder", "png", num=3, seed=7)
    read = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "folder").iterdir())]
    np.testing.assert_array_equal(read, _read(tmp_path / "a.npz"))
    drawing.sample(trained_run, "prior", tmp_path / "b.npz", "npz", num=3, seed=8)
    assert (_read(tmp_path / "a.npz") != _read(tmp_path / "b.npz")).any()


def test_the_grid_stands_beside_a_folder_with_a_dot_in_its_name(trained_run, tmp_path):
    written = drawing.sample(trained_run, "prior", tmp_path / "t0.5", "png", num=1)
    assert written == [tmp_path / "t0.5", tmp_path / "t0.5.png"]
    assert all(path.exists() for path in written)


def test_a_prior_without_temperature_is_its_mean(trained_run, tmp_path):
    drawing.sample(trained_run, "prior", tmp_path / "a.npz", "npz", num=2, temperature=0.0)
    model = svae_jax.load(trained_run)
    image = steps.decode(model.model, model.variables, np.zeros((1, 3, 3, 4), np.float32))
    expected = np.asarray(pixel_ops.to_uint8(image))
    np.testing.assert_array_equal(_read(tmp_path / "a.npz"), expected.repeat(2, axis=0))


def test_pictures_of_ones_own_are_reconstructed_in_order(trained_run, tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (20, 30, 3)), ("b.jpg", (16, 16))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / name)
    files = [tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "a.png"]
    written = drawing.reconstruct(trained_run, files, tmp_path / "out.npz", "npz")
    assert all(path.exists() for path in written)
    assert _read(tmp_path / "out.npz").shape == (3, 8, 8, 3)


BAD = {
    "sampler": ({"sampler": "gan"}, "--sampler=gan must be one of prior"),
    "not fitted": ({"sampler": "flow"}, "python -m svae_jax.fit_sampler .*--sampler=flow"),
    "option": ({"sampler": "gaussian", "temperature": 2.0}, "has no option temperature"),
    "format": ({"image_format": "gif"}, "--format='gif'"),
    "exists": ({"out": "there.npz"}, r"there\.npz exists"),
    "none": ({"num": 0}, "--num=0 must be at least 1"),
    "no room": ({"num": 10**15}, r"a\.npz cannot be written: it takes .* MB are free"),
    "grid exists": ({"out": "grid.npz"}, r"grid\.png exists"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_one_line_and_write_nothing(trained_run, tmp_path, changed, message):
    (tmp_path / "there.npz").touch()
    (tmp_path / "grid.png").touch()
    arguments = {"sampler": "prior", "out": "a.npz", "image_format": "npz", "num": 2} | changed
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(UserError, match=message) as error:
        drawing.sample(trained_run, **arguments)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"there.npz", "grid.png"}


def test_pictures_that_cannot_be_read_are_named(trained_run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    files = [tmp_path / "a.png", tmp_path / "missing.png"]
    with pytest.raises(UserError, match=r"--reconstruct: 2 of 2 .*a\.png.*missing\.png"):
        drawing.reconstruct(trained_run, files, tmp_path / "out.npz", "npz")
    assert not (tmp_path / "out.npz").exists()


def test_the_command_writes_and_refuses(trained_run, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "svae_jax.sample", f"--workdir={trained_run}"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    done = run("--num=2", f"--out={tmp_path / 'a.npz'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "a.npz"), str(tmp_path / "a.png")]
    done = run("--num=0", f"--out={tmp_path / 'b.npz'}")
    assert (done.returncode, done.stderr) == (2, "error: --num=0 must be at least 1\n")
