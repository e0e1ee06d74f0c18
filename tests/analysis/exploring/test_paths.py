"""`paths`: interpolation and principal directions, against their definitions."""

import numpy as np
import pytest

from svae_jax.analysis.exploring import paths


@pytest.fixture
def ends():
    return np.random.default_rng(0).normal(size=(2, 2, 3, 4))


def test_a_line_is_even(ends):
    path = paths.linear(*ends, np.linspace(0, 1, 5))
    np.testing.assert_allclose(path[[0, -1]], ends)
    np.testing.assert_allclose(np.diff(path, axis=0), np.repeat(path[1:2] - path[:1], 4, axis=0))


def test_an_arc_keeps_the_norm_and_turns_evenly(ends):
    a, b = (end / np.linalg.norm(end) for end in ends)
    path = paths.spherical(a, b, np.linspace(0, 1, 6)).reshape(6, -1)
    np.testing.assert_allclose(path[[0, -1]], [a.ravel(), b.ravel()], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 1)
    angles = np.arccos(np.sum(path[1:] * path[:-1], axis=1))
    np.testing.assert_allclose(angles, np.arccos(a.ravel() @ b.ravel()) / 5)


@pytest.mark.parametrize("factor", [2.0, 0.0, -1.0])
def test_an_arc_without_a_plane_is_a_line(ends, factor):
    weights = np.linspace(0, 1, 3)
    a, b = ends[0], factor * ends[0]
    np.testing.assert_array_equal(paths.spherical(a, b, weights), paths.linear(a, b, weights))


def test_directions_are_the_eigenvectors_of_the_covariance():
    rng = np.random.default_rng(1)
    means = rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12))
    where = np.ones((2, 3, 2), bool)
    found = paths.principal_directions(means.reshape(50, 2, 3, 2), where, 3).reshape(3, 12)
    values, vectors = np.linalg.eigh(np.cov(means, rowvar=False))
    for i in range(3):
        expected = vectors[:, -1 - i] * np.sqrt(values[-1 - i])
        np.testing.assert_allclose(found[i], expected * np.sign(expected @ found[i]))
        assert found[i][np.abs(found[i]).argmax()] > 0


def test_directions_stay_inside_the_mask():
    means = np.random.default_rng(2).normal(size=(9, 2, 3, 2))
    where = np.zeros((2, 3, 2), bool)
    where[1, 2, 0] = True
    found = paths.principal_directions(means, where, 5)
    assert found.shape == (1, 2, 3, 2)
    np.testing.assert_allclose(found[0, 1, 2, 0], means[:, 1, 2, 0].std(ddof=1))
    assert np.count_nonzero(found) == 1
