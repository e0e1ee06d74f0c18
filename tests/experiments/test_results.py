"""What is committed under experiments/results: every table is made of the numbers beside it."""

import json
import math
import pathlib

import pytest

from experiments import rank
from experiments.compare import tables

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
RENDER = {"experiments.compare": tables.render, "experiments.rank": rank.render}


def numbers(content):
    """All floating-point numbers in a nested structure."""
    if isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from numbers(item)
    elif isinstance(content, float):
        yield content


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_the_tables_are_those_of_their_numbers(path):
    content = json.loads(path.read_text())
    (render,) = (r for name, r in RENDER.items() if name in content["settings"]["command"])
    assert path.with_suffix(".md").read_text() == render(content)
    assert all(math.isfinite(number) for number in numbers(content))
    assert content["runs"]
