"""Rate and distortion: a whole small run, which is continued and drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import rates
from svae_jax.training import loop

CONFIG = """
from svae_jax import config as configs


def get_config(arg="mvn"):
    config = configs.base()
    config.dataset.update(name="folder", data_dir={images!r}, height=16, width=16, channels=3)
    config.dataset.cache_dir = {cache!r}
    config.model.update(encoder="3x3/4/s2 3x3/4/s2", decoder="3x3/6 3x3/4 3x3/image/s2")
    configs.latent_from_arg(config, arg, d=4, N=4, C=8)
    config.update(batch_size=20, num_steps=4)
    return config
"""


@pytest.fixture
def arguments(tiny_images, tmp_path):
    file = tmp_path / "small.py"
    file.write_text(CONFIG.format(images=str(tiny_images), cache=str(tmp_path / "cache")))
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
