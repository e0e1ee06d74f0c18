"""The count of objects in samples of the embedded scenes."""

import json
import shutil

import numpy as np
import pytest
from scipy import ndimage

import svae_jax
from experiments.results import scenes
from svae_jax.data.sources import shapes
from svae_jax.errors import UserError


def draw(count):
    return [shapes.scene("test", index) for index in range(count)]


def test_the_count_is_the_true_one_on_nearly_all_scenes():
    drawn = draw(200)
    found = [scenes.count(image) for image, _ in drawn]
    right = [
        one.objects == factors["count"] for one, (_, factors) in zip(found, drawn, strict=True)
    ]
    assert np.mean(right) > 0.97
    assert np.mean([one.is_whole for one in found]) > 0.95


@pytest.mark.parametrize("index", range(5))
def test_the_ground_is_the_gradient_between_the_two_colours(index):
    image, factors = shapes.scene("test", index)
    found = scenes.ground(image / 255)
    expected = shapes._shade(factors["ground_colours"] / 255, float(factors["ground_angle"]))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_textures_stains_and_empty_grounds_are_not_scenes():
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 255, (32, 32, 3))
    cloud = ndimage.gaussian_filter(noise, (2, 2, 0))
    cloud = 255 * (cloud - cloud.min()) / np.ptp(cloud)
    empty = np.full((32, 32, 3), 128.0)
    for image in (noise, cloud, empty):
        assert not scenes.count(image.astype(np.uint8)).is_whole
    stained, _ = shapes.scene("test", 0)
    assert scenes.count(stained).is_whole
    stained[2:6, 4:28:2] = 255 - stained[2:6, 4:28:2]  # too small to be objects
    assert not scenes.count(stained).is_whole


def test_blurred_scenes_are_soft():
    image, _ = shapes.scene("test", 0)
    blurred = ndimage.gaussian_filter(image, (2, 2, 0))
    assert scenes.count(blurred).softness > 5 * scenes.count(image).softness


def test_a_summary_counts_shares():
    images = np.stack([image for image, _ in draw(50)])
    row = scenes.summary("scenes", images)
    assert sum(row["objects"].values()) == pytest.approx(1)
    assert row["whole, %"]["value"] > 90
    page = scenes.render({"settings": {"command": "", "num": 50, "step": 3}, "runs": [row]})
    assert f"| scenes | {row['whole, %']['value']:.1f} ± " in page


def test_the_command_counts_and_draws_and_refuses_other_images(tmp_path):
    for name in ("shapes", "cifar10"):
        shutil.copytree(svae_jax.pretrained(name).directory, tmp_path / name)
    scenes.main([f"--workdir={tmp_path / 'shapes'}", "--num=20"])
    rows = json.loads((tmp_path / "shapes" / "scenes.json").read_text())["runs"]
    assert [row["images"] for row in rows] == ["held-out scenes", "their reconstructions", "prior"]
    held_out, reconstructions, prior = (row["whole, %"]["value"] for row in rows)
    assert min(held_out, reconstructions) > 80 > prior
    assert (tmp_path / "shapes" / "scenes.png").exists()
    with pytest.raises(UserError, match=r"is not a run of the embedded scenes \(shapes\)"):
        scenes.main([f"--workdir={tmp_path / 'cifar10'}"])
    with pytest.raises(UserError, match="--samplers is empty"):
        scenes.main([f"--workdir={tmp_path / 'shapes'}", "--samplers="])
