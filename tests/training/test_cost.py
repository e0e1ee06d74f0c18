"""`cost`: what a run will take."""

import pytest

from svae_jax.training import cost
from svae_jax.training import job as jobs


@pytest.mark.parametrize(("share", "memory"), [(1.0, "9.2e-06"), (0.0, "0")])
def test_images_count_where_they_live_on_the_device(
    tiny_config, tmp_path, monkeypatch, share, memory
):
    for constant in ("_CPU_PROCESS", "_COPIES_OF_FEATURES", "_COPIES_OF_PARAMS"):
        monkeypatch.setattr(cost, constant, 0)
    tiny_config.dataset.resident_share = share
    job = jobs.prepare(tiny_config, tmp_path / "run")  # of 48 images of 192 bytes
    assert f"about {memory} GB of memory" in cost.summary(job)
