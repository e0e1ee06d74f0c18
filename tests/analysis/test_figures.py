"""`figures`: each call gives one figure of what it was given, and changes no setting."""

import io

import matplotlib
import numpy as np
import pytest

from svae_jax.analysis import figures
from svae_jax.analysis.exploring import KLMap, locality

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)
FLOATS = PICTURES / 127.5 - 1
MASK = np.eye(2, dtype=bool)
KL = KLMap(np.ones((4, 2, 2)), np.zeros(4), np.arange(144.0).reshape(4, 6, 6))
REACH = locality.summarise(np.random.default_rng(1).random((2, 3, 6, 6)))
METRICS = {"a": [{"step": 1, "eval/elbo": 3.0}, {"step": 2}, {"step": 3, "eval/elbo": None}]}

# name -> (a call, the number of pictures in it)
CALLS = {
    "images": (lambda: figures.images(PICTURES), 1),
    "grey": (lambda: figures.rows({"grey": FLOATS[..., :1]}), 4),
    "reconstructions": (lambda: figures.reconstructions(PICTURES, FLOATS), 8),
    "uneven rows": (lambda: figures.rows({"prior": FLOATS, "flow": FLOATS[:2]}), 6),
    "traversal": (lambda: figures.traversal({"": FLOATS}, [-1.0, 0.0, 1.0, 2.0]), 4),
    "edits": (lambda: figures.edits(PICTURES, FLOATS[:1], FLOATS, MASK), 12),
    "one edit": (lambda: figures.edits(PICTURES[0], FLOATS[0], FLOATS[:1], MASK), 3),
    "reach": (lambda: figures.reach(REACH), 6),
    "kl_maps": (lambda: figures.kl_maps(PICTURES, KL), 8),
    "curves": (lambda: figures.curves(METRICS | {"b": METRICS["a"]}, "eval/elbo"), 0),
}


@pytest.mark.parametrize(("call", "pictures"), CALLS.values(), ids=CALLS.keys())
def test_a_call_gives_a_figure_and_changes_no_setting(call, pictures):
    before = dict(matplotlib.rcParams)
    figure = call()
    assert sum(len(axis.get_images()) for axis in figure.axes) == pictures
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    assert b"<svg" in file.getvalue()
    assert dict(matplotlib.rcParams) == before


def test_levels_and_floats_are_the_same_colours():
    shown = [
        figures.rows({"": pictures}).axes[0].get_images()[0].get_array()
        for pictures in (PICTURES, FLOATS)
    ]
    np.testing.assert_allclose(shown[0], PICTURES[0] / 255)
    np.testing.assert_allclose(shown[1], PICTURES[0] / 255)


def test_points_without_a_value_are_left_out():
    (line,) = figures.curves(METRICS, "eval/elbo").axes[0].get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[1, 3]])


def test_lines_are_drawn_in_each_panel_with_the_levels_of_their_series():
    points = {"a": [{"x": 1, "y": 2.0, "z": 5.0}, {"x": 10, "y": 3.0, "z": 4.0}], "b": []}
    panels = [(("x", "an x"), ("y", "a y")), (("z", "a z"), ("y", "a y"))]
    left, right = figures.lines(points, panels, {"a": 7.0}).axes
    assert (left.get_xlabel(), right.get_xlabel(), right.get_ylabel()) == ("an x", "a z", "a y")
    for axis, expected in ((left, [[1, 2], [10, 3]]), (right, [[5, 2], [4, 3]])):
        line, level, empty = axis.get_lines()
        np.testing.assert_array_equal(line.get_xydata(), expected)
        np.testing.assert_array_equal(level.get_ydata(), [7, 7])
        assert level.get_color() == line.get_color()
        assert not len(empty.get_xydata())
    left.figure.canvas.draw()
    labels = [text.get_text() for text in left.get_xticklabels(which="both")]
    assert {"1", "3", "10"} <= {*labels}
    assert not any("times" in label for label in labels)  # 3 × 10⁰, which overlap
    assert [text.get_text() for text in left.figure.legends[0].get_texts()] == ["a", "b"]


def test_a_frame_surrounds_the_patches_of_its_cells():
    framed = figures.edits(PICTURES[:1], PICTURES[:1], FLOATS[:1], MASK).axes[1]
    x, y = framed.get_lines()[0].get_data()
    edges = {(x[i : i + 2].mean(), y[i : i + 2].mean()) for i in range(0, len(x), 3)}
    assert len(edges) == 2 * 4 * 3  # two squares of 3 × 3 pixels
    assert {(0.0, -0.5), (-0.5, 0.0), (2.5, 1.0), (5.5, 4.0), (4.0, 2.5)} <= edges
    assert (2.5, 4.0) in edges
    assert (1.0, 1.5) not in edges
