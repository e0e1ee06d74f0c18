"""Configurations by their names."""

from pathlib import Path

import pytest

from svae_jax import command_line, config_files
from svae_jax.errors import UserError
from tests.command_line import ROOT


def test_the_names_are_those_of_the_folder():
    assert config_files.names() == ["celeba", "cifar10", "images", "shapes"]


@pytest.mark.parametrize("name", config_files.names())
def test_a_name_stands_for_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name, _ = command_line.load_config(f"{name}:mvn", ["--config.batch_size=7"])
    by_path, _ = command_line.load_config(f"{ROOT}/configs/{name}.py:mvn")
    assert by_name.batch_size == 7
    by_path.batch_size = 7
    assert by_name.to_dict() == by_path.to_dict()


def test_a_path_is_relative_where_it_can_be(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert config_files.resolved("shapes:lowrank,rank=2") == "configs/shapes.py:lowrank,rank=2"
    monkeypatch.chdir(tmp_path)
    assert config_files.resolved("shapes") == f"{ROOT}/configs/shapes.py"


@pytest.mark.parametrize("path", ["configs/shapes.py", "mine.py:best", "./mine:best", "a:b/c.py"])
def test_a_path_stays(path):
    assert config_files.resolved(path) == path


def test_a_file_that_lies_about_does_not_take_the_place_of_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes").write_text("")
    assert config_files.resolved("shapes:best") == f"{ROOT}/configs/shapes.py:best"
    assert config_files.resolved("./shapes:best") == "./shapes:best"


@pytest.mark.parametrize("name", ["shape", "", "best"])
def test_an_unknown_name_lists_the_known_ones(name):
    known = "celeba, cifar10, images, shapes"
    with pytest.raises(UserError, match=f"--config={name}: there is no .*; give one of {known}"):
        command_line.load_config(f"{name}:best")


def test_a_path_that_is_gone_names_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="go by their names: celeba, cifar10, images, shapes"):
        command_line.load_config("configs/shapes.py:best")
