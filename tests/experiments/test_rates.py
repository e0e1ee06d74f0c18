"""Rate and distortion: a whole small run, which is continued and drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import rates
from svae_jax.training import loop


@pytest.fixture
def arguments(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        "from configs import shapes\n\n\n"
        "def get_config(arg='mvn'):\n"
        "    config = shapes.get_config(arg)\n"
        '    config.model.update(encoder="3x3/4/s2 3x3/4/s2", norm="none")\n'
        '    config.model.decoder = "3x3/8 3x3/8 5x5/4/s2 5x5/image/s2"\n'
        '    config.dataset.update(split="train[:200]", eval_split="test[:40]")\n'
        "    config.update(batch_size=20, num_steps=4)\n"
        "    return config\n"
    )
    return [f"--config={file}", f"--workdir={tmp_path / 'rates'}", "--models=mvn,N=4"]


def test_a_small_run_from_nothing_and_once_more(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "COMPONENTS", (2, 20, 100))
    rates.main([*arguments, "--betas=1 1000"])
    content = json.loads((tmp_path / "rates" / "rates.json").read_text())
    trained, pca = content["runs"][:2], content["runs"][2:]
    assert [point["beta"] for point in trained] == [1, 1000]
    assert trained[0]["kl"] > trained[1]["kl"]
    assert [point["components"] for point in pca] == [2, 20, 100]
    for name in ("kl", "psnr", "ssim"):
        assert pca[0][name] < pca[1][name] < pca[2][name]
    picture = np.asarray(Image.open(tmp_path / "rates" / "rates.png"))
    assert picture.std() > 10
    monkeypatch.setattr(loop, "_Loop", lambda *args: pytest.fail("it trains again"))
    rates.main([*arguments, "--betas=1 1000"])
    assert json.loads((tmp_path / "rates" / "rates.json").read_text()) == content
