"""`evaluating` and `tables`: a run's evaluation, by the function and by the command."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import svae_jax
from svae_jax import sampler_config
from svae_jax.analysis import evaluating, fitting, tables
from svae_jax.errors import UserError
from svae_jax.evaluation.quality import features
from svae_jax.training import loop
from tests import command_line

SETTINGS = evaluating.Settings(importance_samples=5)


@pytest.fixture(scope="module")
def evaluated(trained_run):
    return evaluating.evaluate(trained_run, SETTINGS)


def test_the_elbo_is_that_of_the_run(trained_run, evaluated):
    metrics = json.loads((trained_run / "result.json").read_text())["metrics"]
    bounds = evaluated["bounds"]
    for name in ("elbo", "kl", "reconstruction", "bits_per_dim"):
        # To the rounding of two programs: this one computes all metrics.
        assert bounds[name]["value"] == pytest.approx(metrics[f"eval/{name}"], rel=1e-5)
    assert bounds["sigma"] == metrics["eval/sigma"]
    assert evaluated["num_images"] == 20


def test_features_of_real_images_are_computed_once_for_all_evaluations(
    trained_run, tmp_path, monkeypatch
):
    copy = shutil.copytree(trained_run, tmp_path / "run")
    embedded = []

    def embed(self, images, *, progress=iter):
        embedded.append(len(images))
        return np.float32(images.reshape(len(images), -1)[:, :: 192 // self.dim])

    extractor = features.Extractor("inception", "none 1.0", "none", "none", 6, len, "cpu")
    monkeypatch.setattr(features.Extractor, "__call__", embed)
    monkeypatch.setattr(features, "load", lambda name: extractor)
    directory = tmp_path / "cache"
    monkeypatch.setattr(evaluating.data, "cache_directory", lambda _: directory)
    settings = SETTINGS._replace(features="inception", importance_samples=1)
    first, second = (evaluating.evaluate(copy, settings)["samples"] for _ in range(2))
    assert first == second
    assert embedded == [20, 48, 20, 20, 20, 20]  # held out, training, and the samplers' twice
    assert len(list(directory.glob("features_inception_none_1.0_*.npy"))) == 2
    assert set(first["prior"]["memorisation"]) == {"pixels", "features"}
    assert "fid" in first[evaluating.FLOOR]["features"]["figures"]


def test_the_importance_weighted_bound_is_above_the_elbo(evaluated):
    bounds = evaluated["bounds"]
    assert bounds["elbo_iw"]["value"] > bounds["elbo"]["value"]
    assert bounds["bits_per_dim_iw"]["value"] < bounds["bits_per_dim"]["value"]


def test_samplers_stand_in_the_priors_place(evaluated):
    """The same samples of z, so the model's own prior gives the model's own bounds."""
    bounds = evaluated["samples"]["prior"]["bounds"]
    for name in ("elbo_iw", "bits_per_dim_iw"):
        assert bounds[name]["value"] == pytest.approx(evaluated["bounds"][name]["value"], rel=1e-5)
    error = bounds["elbo"]["standard_error"]
    assert abs(bounds["elbo"]["value"] - evaluated["bounds"]["elbo"]["value"]) < 5 * error
    rows = {row["samples"]: row for row in tables.sets([evaluated])}
    assert rows["prior"]["bits/dim, K=5"] == tables.figure(bounds["bits_per_dim_iw"])
    assert "ELBO, nats" not in rows[evaluating.FLOOR]


def test_the_gaussian_of_the_aggregate_is_the_best_prior_that_is_gaussian(trained_run, tmp_path):
    """Of the images that it is fitted to: their mean log-density under N(0, I) is lower."""
    copy = shutil.copytree(trained_run, tmp_path / "run")
    split = svae_jax.load(copy).config.dataset.split
    settings = sampler_config.base()
    settings.update_from_flattened_dict(
        {
            "latent_flow.num_steps": 1,
            "latent_flow.width": 16,
            "latent_flow.depth": 1,
            "latent_flow.num_params": 15_000,
        }
    )
    fitting.fit(copy, "latent_flow", settings)
    found = evaluating.evaluate(copy, SETTINGS._replace(split=split, importance_samples=50))
    bounds = {
        name: found["samples"][name]["bounds"] for name in ("prior", "gaussian", "latent_flow")
    }
    assert bounds["gaussian"]["elbo"]["value"] > bounds["prior"]["elbo"]["value"]
    # One step has learned nothing, so the flow is that Gaussian still.
    gap = bounds["latent_flow"]["elbo"]["value"] - bounds["gaussian"]["elbo"]["value"]
    assert abs(gap) < 3  # of one sample of z an image, the other of 50
    assert bounds["latent_flow"].keys() == {"elbo"}  # of an estimate
    rows = {row["samples"]: row for row in tables.sets([found])}
    assert "bits/dim, K=50" not in rows["latent_flow"]


def test_linear_floors_stand_beside_the_run(evaluated):
    """Four updates have not learned what PCA knows."""
    assert {"same latent", "as many latents"} <= evaluated["floors"].keys()
    elbo = evaluated["bounds"]["elbo"]["value"]
    assert evaluated["floors"]["same latent"]["elbo"]["value"] > elbo
    for row, floor in zip(tables.floors([evaluated]), evaluated["floors"].values(), strict=True):
        assert float(row["run - PCA"].replace(",", "")) == round(elbo - floor["elbo"]["value"])


def test_the_file_holds_what_is_returned_and_every_set_has_a_picture(trained_run, evaluated):
    assert json.loads((trained_run / "evaluation.json").read_text()) == evaluated
    assert list(evaluated["samples"]) == [evaluating.FLOOR, "prior", "gaussian"]
    names = {path.name for path in (trained_run / "evaluation").iterdir()}
    assert names == {"samples.png", "nearest_prior_pixels.png", "nearest_gaussian_pixels.png"}
    grid = np.asarray(Image.open(trained_run / "evaluation" / "samples.png"))
    assert grid.std() > 0
    assert np.array(evaluated["latents"]["kl_per_map"]).sum() == pytest.approx(
        evaluated["bounds"]["kl"]["value"], rel=1e-5
    )


def test_an_evaluation_is_deterministic_and_another_split_has_files_of_its_own(
    trained_run, evaluated, tmp_path
):
    copy = shutil.copytree(trained_run, tmp_path / "run")
    again = evaluating.evaluate(copy, SETTINGS)
    assert again | {"workdir": ""} == evaluated | {"workdir": ""}
    before = (copy / "evaluation.json").read_bytes()
    other = evaluating.evaluate(copy, SETTINGS._replace(split="train[:24]"))
    assert other["num_images"] == 24
    assert (copy / "evaluation.json").read_bytes() == before
    (file,) = copy.glob("evaluation_train_24_*.json")
    assert json.loads(file.read_text()) == other


DEVICES = """
import json, sys
from svae_jax.analysis import evaluating
import jax
assert jax.device_count() == 4
print(json.dumps(evaluating.evaluate(sys.argv[1], evaluating.Settings(importance_samples=5))))
"""


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_four_devices_find_the_same(trained_run, evaluated, tmp_path):
    copy = shutil.copytree(trained_run, tmp_path / "run")
    environment = os.environ | command_line.host_devices(4)
    done = subprocess.run(
        [sys.executable, "-c", DEVICES, str(copy)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    four = json.loads(done.stdout)
    for part in ("bounds", "reconstruction", "latents"):
        np.testing.assert_allclose(
            _numbers(four[part]), _numbers(evaluated[part]), rtol=1e-5, atol=1e-7
        )


def test_runs_stand_in_one_table(evaluated):
    text = tables.evaluations([evaluated, evaluated | {"workdir": "other"}])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 2) + (2 + 2 * len(evaluated["floors"])) + (2 + 6)
    assert sum("other" in row for row in rows) == 1 + len(evaluated["floors"]) + 3
    assert "gaussian" in text
    assert "K=5" in text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1350.358, 17.2, "1,350 ± 17"),
        (6.35761, 0.00812, "6.3576 ± 0.0081"),
        (0.0, 0.0, "0 ± 0"),
        (0.5, None, "0.5000"),
        (None, None, "NaN"),
    ],
)
def test_figures_are_rounded_to_the_errors_second_digit(value, error, text):
    assert tables.figure({"value": value, "standard_error": error}) == text


BAD = {
    "K": ({"importance_samples": 0}, "--importance_samples=0 must be at least 1"),
    "num": ({"num_samples": 1}, "--num_samples=1 must be at least 20"),
    "split": ({"split": "nowhere"}, "nowhere.*train"),
    "empty split": ({"split": "test[:0]"}, "it holds no image"),
    "features": ({"features": "vgg"}, "features must be one of inception"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_bad_settings_are_one_line(trained_run, changed, message):
    with pytest.raises(UserError, match=message) as error:
        evaluating.evaluate(trained_run, SETTINGS._replace(**changed))
    assert "\n" not in str(error.value)


def test_a_sampler_of_an_older_checkpoint_is_refused(trained_run, tmp_path):
    copy = shutil.copytree(trained_run, tmp_path / "run")
    config = svae_jax.load(copy).config
    config.num_steps = 5
    loop.train(config, copy)
    again = r"step 4.*step 5.*python -m svae_jax\.fit_sampler .*--sampler=gaussian"
    with pytest.raises(UserError, match=again):
        evaluating.evaluate(copy, SETTINGS)


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        evaluating.evaluate(tmp_path, SETTINGS)


def test_the_command_prints_one_line_for_a_mistake():
    done = subprocess.run(
        [sys.executable, "-m", "svae_jax.evaluate", "--workdir=/nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: /nowhere is not the workdir")
    assert "Traceback" not in done.stderr
