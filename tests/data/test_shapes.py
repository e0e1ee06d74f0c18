"""The embedded data set: its pixels never change, and its factors describe them."""

import hashlib

import numpy as np
import pytest

from svae_jax.data.sources import shapes
from svae_jax.data.sources.shapes import KINDS, scene

SCENES = [scene("train", index) for index in range(400)]


def test_a_scene_depends_on_split_and_index_alone():
    image, factors = SCENES[7]
    again, same_factors = scene("train", 7)
    np.testing.assert_array_equal(image, again)
    for key in factors:
        np.testing.assert_array_equal(factors[key], same_factors[key])
    assert image.dtype == np.uint8
    assert image.shape == (32, 32, 3)


def test_scenes_do_not_change():
    # Another hash means another data set: raise the version of SpatialShapes.
    images = np.stack([image for image, _ in SCENES[:20]])
    assert (
        hashlib.sha256(images).hexdigest()
        == "b2f44eb86e2d352ce1b6face83135c70ff5a3df5dbc7fa1c3c88d3f3501897e1"
    )


def test_train_and_test_share_nothing():
    train = {image.tobytes() for image, _ in SCENES}
    test = {scene("test", index)[0].tobytes() for index in range(400)}
    assert len(train) == len(test) == 400
    assert not train & test


def masks(factors):
    """Coverages of the shapes, furthest first."""
    return [
        shapes.coverage(
            KINDS[factors["kind"][i]],
            factors["centre"][i],
            float(factors["radius"][i]),
            float(factors["angle"][i]),
        )
        for i in range(factors["count"])
    ]


@pytest.mark.parametrize("index", range(60))
def test_factors_redraw_the_picture(index):
    image, factors = SCENES[index]
    y, x = np.mgrid[:32, :32] + 0.5 - 16
    c, s = np.cos(factors["ground_angle"]), np.sin(factors["ground_angle"])
    share = 0.5 + (x * c + y * s) / (32 * (abs(c) + abs(s)))
    first, second = factors["ground_colours"].astype(float)
    picture = first + share[..., None] * (second - first)
    for mask, colour in zip(masks(factors), factors["colour"], strict=False):
        picture = (1 - mask[..., None]) * picture + mask[..., None] * colour
    np.testing.assert_allclose(image, picture, atol=1.1)


def test_nearest_shape_has_its_colour_at_its_centre():
    for image, factors in SCENES:
        nearest = factors["count"] - 1
        x, y = factors["centre"][nearest].astype(int)
        np.testing.assert_array_equal(image[y, x], factors["colour"][nearest])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.1])
def test_coverage_has_the_right_area_centre_and_soft_edge(kind, angle):
    mask = shapes.coverage(kind, np.array([15.3, 16.8]), 6.0, angle)
    assert mask.sum() == pytest.approx(np.pi * 6**2, rel=0.01)
    y, x = np.mgrid[:32, :32] + 0.5
    assert (mask * x).sum() / mask.sum() == pytest.approx(15.3, abs=0.05)
    assert (mask * y).sum() / mask.sum() == pytest.approx(16.8, abs=0.05)
    assert 0 <= mask.min() <= mask.max() <= 1
    assert 15 < ((mask > 0.02) & (mask < 0.98)).sum() < 70  # the pixels that the edge crosses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("angle", [0.2, 1.9])
def test_coverage_agrees_with_counting_points(kind, angle):
    centre, radius, fine = np.array([14.2, 17.7]), 5.5, 16
    y, x = (np.mgrid[: 32 * fine, : 32 * fine] + 0.5) / fine
    x, y = x - centre[0], y - centre[1]
    # In these coordinates the normal of one edge points along x.
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    if kind == "disc":
        inside = u**2 + v**2 <= radius**2
    elif kind == "square":
        inside = np.maximum(abs(u), abs(v)) <= radius * np.sqrt(np.pi) / 2
    else:
        side = radius * np.sqrt(4 * np.pi / np.sqrt(3))
        inradius = side / (2 * np.sqrt(3))
        inside = (u <= inradius) & (abs(v) <= (u + 2 * inradius) / np.sqrt(3))
    counted = inside.reshape(32, fine, 32, fine).mean((1, 3))
    mask = shapes.coverage(kind, centre, radius, angle)
    assert abs(mask - counted).max() < 0.15
    assert abs(mask - counted).mean() < 0.002


def test_distribution():
    counts = np.array([factors["count"] for _, factors in SCENES])
    filled = np.arange(3) < counts[:, None]

    def stack(key):
        return np.stack([factors[key] for _, factors in SCENES])

    for value in (1, 2, 3):
        assert 90 < (counts == value).sum() < 180
        assert 0.25 < (stack("kind")[filled] == value - 1).mean() < 0.42
    assert (stack("kind")[~filled] == -1).all()
    assert not stack("colour")[~filled].any()
    radius, centre = stack("radius")[filled], stack("centre")[filled]
    assert 3.5 <= radius.min() < 3.7
    assert 7.3 < radius.max() <= 7.5
    assert (centre >= radius[:, None]).all()
    assert (centre <= 32 - radius[:, None]).all()
    assert (abs(centre.mean(0) - 16) < 1).all()
    turn = np.array([0, np.pi / 2, 2 * np.pi / 3])[stack("kind")[filled]]
    angle = stack("angle")[filled]
    assert (angle <= turn).all()
    assert angle[turn > 0].mean() == pytest.approx(turn[turn > 0].mean() / 2, rel=0.1)


def test_every_shape_can_be_seen():
    for _, factors in SCENES:
        count = factors["count"]
        colours = factors["colour"][:count].astype(float)
        others = np.vstack([np.linspace(*factors["ground_colours"].astype(float), 9), colours])
        distance = np.linalg.norm(colours[:, None] - others, axis=-1)
        distance[np.arange(count), 9 + np.arange(count)] = np.inf
        assert distance.min() > 0.4 * 255
        above = np.ones((32, 32))
        for mask in reversed(masks(factors)):
            assert (mask * above).sum() > 0.59 * mask.sum()
            assert (
                mask.sum() > 0.9 * shapes.coverage("disc", np.array([16.0, 16.0]), 3.5, 0.0).sum()
            )
            above *= 1 - mask
