"""The parts of the page: markup, charts, and pictures made of tiles."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svae_jax.analysis.report import curves, pictures
from svae_jax.analysis.report.markup import Markup, tag, void


def test_text_is_escaped_once_and_markup_never():
    inner = tag("b", '<&"')
    assert inner == "<b>&lt;&amp;&quot;</b>"
    assert tag("p", inner, "<", class_="a", aria_label='"') == (
        f'<p class="a" aria-label="&quot;">{inner}&lt;</p>'
    )
    assert void("img", alt="x") == '<img alt="x">'
    assert isinstance(inner, Markup)


def _points(svg, run):
    path = re.search(rf'<g class="curve run-{run}"><path d="M([^"]*)"', svg)[1]
    return np.array([point.split() for point in path.split("L")], float)


def test_a_chart_places_its_points_in_proportion():
    rows = [{"step": 0, "a": 0.0}, {"step": 5, "b": 1.0}, {"step": 10, "a": 4.0}]
    flat = [{"step": 5, "a": 2.0}, {"step": 10, "a": None}]
    svg = curves.chart([rows, flat], "a", "title")
    first, second = _points(svg, 0), _points(svg, 1)
    assert first[1, 0] > first[0, 0]
    assert first[1, 1] < first[0, 1]  # up is a smaller y
    np.testing.assert_allclose(second, [first.mean(0)], atol=0.11)
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    for points in (first, second):
        assert (points >= 0).all()
        assert (points <= [width, height]).all()


def test_a_metric_that_no_run_has_makes_no_chart():
    assert curves.chart([[{"step": 1}], []], "a", "title") == ""


@given(st.floats(-1e9, 1e9, width=32, allow_subnormal=False), st.sampled_from([0, 1e-9, 0.3, 1e9]))
def test_ticks_are_few_and_even_and_cover_the_values(low, span):
    ticks = curves._ticks(low, low + span)
    assert 2 <= len(ticks) <= 9
    slack = 1e-6 * (abs(low) + span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-3)


def test_tiles_are_placed_row_by_row_with_transparent_gaps():
    tiles = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 6, 3), np.uint8)
    picture = pictures.grid(tiles, 2, row_gaps=(2,))
    assert picture.shape == (8 + 2 + 8, 6 + 4 + 6, 4)
    assert (picture[:8, :6] == [1, 1, 1, 255]).all()
    assert (picture[:8, 10:] == [2, 2, 2, 255]).all()
    assert (picture[10:, :6] == [3, 3, 3, 255]).all()
    opaque = picture[..., 3] == 255
    assert opaque.sum() == 3 * 48
    assert not picture[~opaque].any()
    joined = pictures.beside(picture, picture[:8])
    assert joined.shape[0] == 18
    np.testing.assert_array_equal(joined[:, :16], picture)
    np.testing.assert_array_equal(joined[:8, -16:], picture[:8])
    assert not joined[8:, -16:].any()


def test_gaps_under_rows_take_turns():
    tiles = np.full((4, 8, 8, 3), 9, np.uint8)
    opaque = pictures.grid(tiles, 1, row_gaps=(2, 14))[:, 0, 3] == 255
    edges = np.flatnonzero(np.diff(opaque.astype(int))) + 1
    np.testing.assert_array_equal(edges, [8, 10, 18, 32, 40, 42])


@pytest.mark.parametrize(("side", "expected"), [(8, 64), (32, 64), (96, 96), (200, 66)])
def test_tiles_have_a_size_that_fits_the_page(side, expected):
    images = np.zeros((2, side, side, 3), np.uint8)
    images[:, side // 2 :] = 200
    tiles = pictures.tiles(images)
    assert tiles.shape == (2, expected, expected, 3)
    assert tiles.min() == 0
    assert tiles.max() == 200
    grey = pictures.tiles(images[..., :1])
    np.testing.assert_array_equal(grey, tiles)
    assert pictures.heat(np.zeros((3, side, side))).shape == (3, expected, expected, 3)


def test_heat_grows_lighter_from_nothing_to_the_top():
    ramp = np.linspace(0, 2, 64 * 64).reshape(1, 64, 64)
    lightness = pictures.heat(ramp).astype(int).sum(-1).ravel()
    assert (np.diff(lightness) >= -2).all()  # rounding of three channels
    np.testing.assert_array_equal(pictures.heat(ramp), pictures.heat(ramp / 2, top=1.0))
    assert pictures.heat(ramp, top=4.0).max() < pictures.heat(ramp).max()


def test_a_frame_is_the_border_of_the_cells_patch():
    tile = np.zeros((8, 8, 3), np.uint8)
    framed = pictures.framed(tile, (1, 0), (2, 2))
    expected = np.zeros((8, 8), bool)
    expected[4:, :4] = True
    expected[5:7, 1:3] = False
    np.testing.assert_array_equal(framed == 255, np.repeat(expected[..., None], 3, -1))
    assert not tile.any()
