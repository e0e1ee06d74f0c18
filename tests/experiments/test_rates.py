"""Rate and distortion: a whole small run, which is continued and drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import rates
from svae_jax.training import loop
from tests import tiny


@pytest.fixture
def arguments(tiny_images, tmp_path):
    file = tmp_path / "small.py"
    places = {"images": str(tiny_images), "cache": str(tmp_path / "cache")}
    file.write_text(tiny.FILE.format(**places, num_steps=4))
    return [f"--config={file}", f"--workdir={tmp_path / 'rates'}", "--models=mvn"]


def test_a_small_run_from_nothing_and_once_more(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "COMPONENTS", (2, 10, 40))
    rates.main([*arguments, "--betas=1 1000"])
    content = json.loads((tmp_path / "rates" / "rates.json").read_text())
    trained, pca = content["runs"][:2], content["runs"][2:]
    assert [point["beta"] for point in trained] == [1, 1000]
    assert trained[0]["kl"] > trained[1]["kl"]
    assert [point["components"] for point in pca] == [2, 10, 40]
    for name in ("kl", "psnr", "ssim"):
        assert pca[0][name] < pca[1][name] < pca[2][name]
    picture = np.asarray(Image.open(tmp_path / "rates" / "rates.png"))
    assert picture.std() > 10
    monkeypatch.setattr(loop, "_Loop", lambda *args: pytest.fail("it trains again"))
    rates.main([*arguments, "--betas=1 1000"])
    assert json.loads((tmp_path / "rates" / "rates.json").read_text()) == content
