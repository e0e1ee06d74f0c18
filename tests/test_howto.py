"""The answers of the page "How do I …": commands that exist, with flags and fields that exist."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from svae_jax import __main__ as listing
from svae_jax import command_line, config
from svae_jax.analysis import pretrained
from svae_jax.training import loop
from tests.command_line import ROOT

PAGE = (ROOT / "svae_jax" / "HOWTO.md").read_text()
COMMANDS = [
    shlex.split(line.removesuffix("&"))
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
TRAINING = [words[3:] for words in COMMANDS if words[2] == "svae_jax.main"]


def _is_config(word):
    return word.startswith("--config")


@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_a_training_command_has_fields_that_exist_and_values_that_are_allowed(words):
    first, *fields = filter(_is_config, words)
    found, given = command_line.load_config(first.removeprefix("--config="), fields)
    assert len(given) == len(fields)
    if found.dataset.name == "files":  # whose size is that of the images
        for side in ("height", "width", "channels"):
            found.dataset[side] = found.dataset[side] or {"channels": 3}.get(side, 32)
    config.check(found, num_devices=1)


_PARSE = """
import importlib, json, sys
from absl import flags
from svae_jax import command_line
importlib.import_module(sys.argv.pop())
for words in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    command_line.parse(flags.FLAGS, ["", *words])
"""


@pytest.mark.parametrize("name", sorted({words[2] for words in COMMANDS}))
def test_a_command_has_flags_that_exist(name):
    assert name.removeprefix("svae_jax.") in listing.COMMANDS
    lines = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", name]]
    if name == "svae_jax.main":  # whose fields the other test has
        lines = [["--config=shapes", *(w for w in line if not _is_config(w))] for line in lines]
    subprocess.run(
        [sys.executable, "-c", _PARSE, name], input=json.dumps(lines), text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def trained(tiny_config, tmp_path, monkeypatch):
    """A run in the directory of which the page speaks."""
    tiny_config.num_steps = 2
    monkeypatch.chdir(tmp_path)
    loop.train(tiny_config, "runs/shapes")


def test_the_python_answers_run(trained):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)  # our own page
    assert names["config"].num_steps == names["run"].step == 2
    assert names["images"].shape == (4, 8, 8, 3)


def test_latents_and_a_packed_model_are_written_as_the_page_says(trained, tmp_path):
    lines = [shlex.join(words) for words in COMMANDS if words[2].endswith((".encode", ".pack"))]
    assert len(lines) == 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-ec", "\n".join(lines)], check=True, env=environment, cwd=tmp_path)
    assert np.load("latents.npz")["mean"].shape[1:] == (3, 3, 4)
    assert pretrained.file("shapes.npz").exists()
