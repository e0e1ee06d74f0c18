"""What a run did not write, it does not touch; what is lost, it does not begin anew."""

import json
import shutil

import pytest

from svae_jax import files
from svae_jax.errors import UserError
from svae_jax.run import workdir
from svae_jax.training import loop
from tests.run.test_checkpoint import tree_of

FOREIGN = [
    "samples/000123.png",
    "samples_gaussian/000001.png",
    "reconstructions/000001.png",
    "metrics.jsonl",
    "events.out.tfevents.1.host",
    "checkpoints/1/model.bin",
    "data.json",
    "result.json",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_directory_is_refused_and_left_alone(tiny_config, tmp_path, name):
    file = tmp_path / "theirs" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 500}\n')
    before = tree_of(tmp_path)
    with pytest.raises(UserError, match=name.partition("/")[0]) as caught:
        loop.train(tiny_config, tmp_path / "theirs")
    assert "choose another --workdir" in str(caught.value)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("content", [{}, {"architectures": ["GPT2LMHeadModel"], "seed": 1}])
def test_the_config_of_something_else_is_refused(tiny_config, tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    before = tree_of(tmp_path)
    with pytest.raises(UserError, match=r"config\.json is of something else"):
        loop.train(tiny_config, tmp_path)
    assert tree_of(tmp_path) == before


def test_what_a_run_never_touches_is_no_reason_to_refuse(tmp_path):
    for name in ("slurm-1.out", "notes.txt", "trial.json"):
        (tmp_path / name).touch()
    workdir.check_own(tmp_path)


@pytest.mark.parametrize("directory", ["", " "])
def test_an_empty_path_is_refused(tiny_config, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir= is empty"):
        loop.train(tiny_config, directory)
    assert not list(tmp_path.iterdir())


def test_a_path_is_absolute_and_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.user_path("a/b", "--x") == tmp_path / "a" / "b"
    assert files.user_path("~/b", "--x") == tmp_path / "home" / "b"
    with pytest.raises(UserError, match="gs://bucket/run"):
        files.user_path("gs://bucket/run", "--x")


def test_a_run_whose_checkpoints_are_lost_keeps_its_record(tiny_config, tmp_path):
    tiny_config.num_steps = 4
    loop.train(tiny_config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    kept = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "result.json").read_bytes()
    tiny_config.num_steps = 8
    with pytest.raises(UserError, match="checkpoints of this run are lost"):
        loop.train(tiny_config, tmp_path)
    assert kept == (
        (tmp_path / "metrics.jsonl").read_bytes(),
        (tmp_path / "result.json").read_bytes(),
    )
    assert (tmp_path / "samples" / "000004.png").exists()


def test_leftovers_of_others_stay_in_the_cache(tmp_path):
    """A directory such as /tmp may be given as dataset.cache_dir."""
    import os

    import numpy as np

    from svae_jax.data import cache

    theirs = tmp_path / "theirs.tmp"
    theirs.touch()
    os.utime(theirs, (0, 0))
    array = np.zeros((1, 2, 2, 3), np.uint8)
    cache.open_or_build(tmp_path / "a.npy", array.shape, lambda: iter([array]))
    assert theirs.exists()


def test_the_experiments_refuse_an_empty_path():
    from experiments import options

    def define(values):
        options.define_path("workdir", "a directory", values)

    with pytest.raises(UserError, match="--workdir=: it is empty"):
        options.parse(["--workdir="], None, define)
    assert str(options.parse(["--workdir=runs/a"], None, define).workdir) == "runs/a"
