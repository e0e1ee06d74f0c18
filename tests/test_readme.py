"""What the README shows is what works."""

import re
from pathlib import Path

import jax

from svae_jax import latents

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_library_example_runs_and_says_the_right_shapes():
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict = {}
    exec(block, names)  # our own README
    assert names["z"].shape == (16, 3, 3, 128)
    assert names["kl"].shape == names["log_q"].shape == (16,)
    assert isinstance(names["prior"], jax.Array)


def test_the_table_of_models_is_that_of_the_code():
    table = README.split("## Models")[1].split("The name stands")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == latents.names()


def test_pictures_and_files_that_are_shown_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
