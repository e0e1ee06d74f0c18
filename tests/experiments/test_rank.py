"""What low-rank means can express: truncated means, the table, and a whole small run."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import shapes
from experiments.results import rank
from svae_jax import config as configs
from svae_jax.errors import UserError
from tests.command_line import ROOT


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_truncated_mean_is_the_nearest_of_its_rank(kept, x64):
    """Eckart and Young: the squared distance is the sum of the squared singular values left out."""
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 5))  # two images, five maps of 3 x 4
    nearest = np.asarray(rank.truncate(maps, kept))
    for image, n in np.ndindex(2, 5):
        ours, theirs = nearest[image, :, :, n], maps[image, :, :, n]
        assert np.linalg.matrix_rank(ours) == kept
        left_out = np.linalg.svd(theirs, compute_uv=False)[kept:]
        assert np.sum((ours - theirs) ** 2) == pytest.approx(np.sum(left_out**2), abs=1e-12)


def test_a_truncated_model_keeps_variances_and_variables():
    config = shapes.get_config("mvn,N=4")
    config.model.update(encoder="3x3/4/s2 3x3/4/s2", decoder="3x3/8 3x3/8 5x5/4/s2 5x5/image/s2")
    model = configs.model(config)
    images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1, maxval=1)
    variables = model.init(jax.random.key(1), jax.random.key(2), images)
    truncated = rank.Truncated(model.posterior, model.encoder, model.decoder, rank=1)
    before = model.apply(variables, images, method="encode")
    after = truncated.apply(variables, images, method="encode")
    np.testing.assert_array_equal(after["row_log_variance"], before["row_log_variance"])
    np.testing.assert_allclose(after["mean"], rank.truncate(before["mean"], 1), atol=1e-6)
    assert not np.allclose(after["mean"], before["mean"], atol=1e-4)


def test_the_table_says_what_the_runs_say():
    runs = [
        {"model": "mvn", "seed": 0, "elbo": 9.0},
        {"model": "mvn", "seed": 1, "elbo": 11.0},
        *(
            {"model": "truncated mvn", "rank": r, "seed": s, "elbo": 100.0 * r + s}
            for r in (1, 2)
            for s in (0, 1)
        ),
        *(
            {"model": "lowrank", "rank": r, "nu": nu, "seed": s, "elbo": 1000.0 * r + 10 * i + s}
            for r in (1, 2)
            for i, nu in enumerate(rank.SPEEDS)
            for s in (0, 1)
        ),
    ]
    settings = {
        "dataset": "shapes", "split": "train[90%:]", "seeds": 2, "num_steps": 6, "batch_size": 7,
        "learning_rate": 0.001, "schedule": "cosine", "device": "2 CPU cores", "command": "x",
    }  # fmt: skip
    lines = rank.render({"settings": settings, "runs": runs}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert cells[0] == ["means", "rank 1", "rank 2"]
    assert cells[2][1:] == ["", "10.0 ± 1.4"]
    assert cells[3][1:] == ["100.50 ± 0.71", "200.50 ± 0.71"]
    assert [row[1:] for row in cells[4:]] == [
        ["1,000.50 ± 0.71", "2,000.50 ± 0.71"],
        ["1,010.50 ± 0.71", "2,010.50 ± 0.71"],
        ["1,020.50 ± 0.71", "2,020.50 ± 0.71"],
    ]


def test_no_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="--seeds=0: 0 is not a positive integer"):
        rank.main(["--config=configs/shapes.py", f"--workdir={tmp_path}", "--seeds=0"])


@pytest.mark.slow
def test_a_small_one_from_nothing_and_once_more(tmp_path):
    argv = [
        sys.executable, "-m", "experiments.results.rank", "--config=configs/shapes.py",
        f"--workdir={tmp_path}", "--seeds=1", "--config.num_steps=2",
        "--config.model.encoder=3x3/4/s2 3x3/4/s2 3x3/4/s2",
        "--config.model.decoder=3x3/4 3x3/4 5x5/4/s2 5x5/image/s2",
    ]  # fmt: skip
    subprocess.run(argv, cwd=ROOT, check=True, timeout=900)
    text = (tmp_path / "rank.json").read_text()
    content = json.loads(text)
    elbos = {(r["model"], r.get("rank")): r["elbo"] for r in content["runs"]}
    assert len(content["runs"]) == 1 + 3 + 9
    # A mean of full rank is kept as it is.
    assert elbos["truncated mvn", 3] == pytest.approx(elbos["mvn", None], abs=0.01)
    assert (tmp_path / "rank.md").read_text() == rank.render(content)
    subprocess.run(argv, cwd=ROOT, check=True, timeout=900)
    assert (tmp_path / "rank.json").read_text() == text
