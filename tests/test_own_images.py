"""Runs on images of one's own: any size, dtype and number of channels, from training to report."""

import json
import signal

import numpy as np
import pytest
from PIL import Image

import svae_jax
from configs import images
from svae_jax import sampler_config
from svae_jax.analysis import evaluating, fitting
from svae_jax.analysis.report import page
from svae_jax.evaluation import grids
from svae_jax.run import checkpoint
from svae_jax.training import loop
from tests import command_line
from tests.training.test_arrays import Interrupted, assert_same_run

# The process dies while it saves step 3.
KILLED = """
import os, signal
from svae_jax.run.checkpoint import Checkpointer
save = Checkpointer.save
def save_and_die(self, step, *args, **kwargs):
    save(self, step, *args, **kwargs)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpointer.save = save_and_die
"""


def waves(rng, count, height, width, channels):
    """Smooth images from 0 to 1."""
    y, x = np.mgrid[:height, :width]
    frequencies = rng.uniform(0.02, 0.2, (2, count, 1, 1, channels))
    phase = y[..., None] * frequencies[0] + x[..., None] * frequencies[1]
    return 0.5 + 0.5 * np.sin(phase)


def _floats(place, rng):
    np.save(place / "images.npy", waves(rng, 30, 40, 96, 5).astype(np.float32) * 7 - 2)
    return place / "images.npy"


def _grey(place, rng):
    levels = np.round(4095 * waves(rng, 30, 128, 128, 1)[..., 0]).astype(np.uint16)
    np.savez(place / "images.npz", train=levels[:20], test=levels[20:])
    return place / "images.npz"


def _folder(place, rng):
    for i, image in enumerate(waves(rng, 24, 160, 160, 3)):
        picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
        picture.resize((200, 160) if i % 2 else (160, 160)).save(place / f"{i:02d}.png")
    return place


# Data, what is changed, the image's shape and the latent's.
CASES = {
    "floats": (_floats, {}, (40, 96, 5), (5, 12, 2)),
    "grey": (
        _grey,
        {
            "dataset.split": "train",
            "dataset.eval_split": "test",
            "dataset.value_range": "0,4095",
            "latent.cell": 16,
        },
        (128, 128, 1),
        (8, 8, 2),
    ),
    "folder": (_folder, {}, (160, 160, 3), (20, 20, 2)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A finished run with its configuration, and what its sizes must be."""
    make, changed, shape, latent = CASES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    (place / "data").mkdir()
    config = images.get_config("best,N=2")
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    config.dataset.update(
        data_dir=str(make(place / "data", np.random.default_rng(0))), cache_dir=cache
    )
    strides = " ".join(["3x3/2/s2"] * 3)
    config.model.update(encoder=strides, decoder=f"3x3/16 3x3/4 {strides} 3x3/image")
    config.dataset.update(split="all[:60%]", eval_split="all[60%:]")
    config.update(batch_size=4, num_steps=4, log_every=2, eval_every=2, sample_every=4)
    config.checkpoint.every = 1
    config.update_from_flattened_dict(changed)
    loop.train(config, place / "whole")
    return config, place / "whole", shape, latent


@pytest.mark.usefixtures("small_floors")
def test_a_run_of_any_size_goes_from_training_to_the_report(case):
    _, whole, shape, latent = case
    saved = json.loads((whole / "config.json").read_text())
    found = tuple(saved["dataset"][field] for field in ("height", "width", "channels"))
    assert found == shape
    assert tuple(saved["latent"][field] for field in ("height", "width", "maps")) == latent
    assert saved["model"]["head"] == ("dense" if max(shape[:2]) < 64 else "convolutional")

    run = svae_jax.load(whole)
    some = run.images()[:2]
    assert some.shape == (2, *shape)
    back = run.reconstruct(some)
    assert (back.shape, back.dtype) == (some.shape, some.dtype)
    assert run.encode(some).mean.shape == (2, *latent)
    edited = run.edit(some[:1], some[1:], run.cell(0, latent[1] - 1))
    assert edited.shape == (1, *shape)
    assert run.kl_map(some).over_image.shape == (2, *shape[:2])
    assert run.reach(some[:1], 0, 0).shape == shape[:2]
    side = shape[1] * (1 if shape[2] in (1, 3) else shape[2])
    assert run.display(some).shape[1:3] == (shape[0], side)
    assert grids.pairs(run.display(some), run.display(back)).ndim == 3

    fitting.fit(whole, "kronecker", sampler_config.base())
    settings = evaluating.Settings(importance_samples=1, num_samples=20)
    assert np.isfinite(evaluating.evaluate(whole, settings)["bounds"]["elbo"]["value"])
    assert run.sample(2, "kronecker").shape == (2, *shape)
    assert checkpoint.load(whole / "checkpoints").step == 4


@pytest.mark.parametrize("case", ["grey"], indirect=True)
def test_a_killed_run_of_any_size_ends_in_the_same_bits(case, start, tmp_path):
    config, whole, *_ = case
    killed = start(*command_line.arguments(config, tmp_path / "run"), before=KILLED)
    code, _, stderr = command_line.finish(killed)
    assert code == -signal.SIGKILL, stderr
    loop.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_report_of_two_sizes(tmp_path):
    """Images of another aspect and another number of channels on one page."""
    directories = []
    for name, shape in (("a", (16, 40, 2)), ("b", (24, 16, 3))):
        np.save(tmp_path / f"{name}.npy", waves(np.random.default_rng(1), 30, *shape))
        config = images.get_config("naive,N=2,k=8")
        config.dataset.data_dir = str(tmp_path / f"{name}.npy")
        config.model.update(encoder="3x3/2/s8", decoder="3x3/2 3x3/2 9x9/image/s8", linear="none")
        config.update(batch_size=4, num_steps=2, log_every=1, eval_every=2, sample_every=2)
        directories.append(tmp_path / name)
        loop.train(config, directories[-1])
    out = tmp_path / "report.html"
    page.write(directories, out)
    text = out.read_text()
    assert "16 x 40" in text
    assert "24 x 16" in text


def test_the_cost_is_told_before_anything_compiles(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", waves(np.random.default_rng(1), 30, 64, 40, 3))
    config = images.get_config("best,N=4")
    config.dataset.data_dir = str(tmp_path / "a.npy")
    config.update(batch_size=4, num_steps=2)

    def compiled(*args):
        raise Interrupted

    monkeypatch.setattr(loop, "run", compiled)
    with pytest.raises(Interrupted):
        loop.train(config, tmp_path / "run")
    told = capsys.readouterr().err
    assert "parameters: encoder " in told
    assert "; 160 latents an image; about " in told
    assert told.endswith(" an epoch\n")
