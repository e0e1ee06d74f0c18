"""The reference that is made of the docstrings."""

import importlib
import inspect
import re
import subprocess

import pytest

from tests.command_line import ROOT

_PAGE = (ROOT / "svae_jax" / "README.md").read_text()
(_COMMAND,) = re.findall(r"^python (-m pdoc .*)$", _PAGE, re.MULTILINE)
_MODULES = (
    "latents", "latents.priors", "likelihoods", "analysis.exploring", "analysis.pretrained",
    "analysis.figures",
)  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of the reference, made by the command of the page."""
    out = tmp_path_factory.mktemp("reference")
    command = _COMMAND.replace("-o reference", f"-o {out}")
    found = subprocess.run(
        ["bash", "-c", f"python {command}"], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""  # no warnings
    return out


@pytest.mark.parametrize("name", _MODULES)
def test_the_reference_has_every_public_function_with_a_description(reference, name):
    members = list(_members(importlib.import_module(f"svae_jax.{name}")))
    assert members
    for module, member, value in members:
        assert member in _shown(reference, module), f"{module}.{member}"
        assert inspect.getdoc(value), f"{module}.{member} has no description"


def _shown(reference, module):
    """What has a description on the page of a module."""
    page = (reference / f"{module.replace('.', '/')}.html").read_text()
    return set(re.findall(r'id="([\w.]+)"', page))


def _members(module):
    """The public functions, classes and methods of a module; inherited ones of their own module."""
    for name, value in vars(module).items():
        is_here = getattr(value, "__module__", "") == module.__name__
        is_public = name in module.__all__ if hasattr(module, "__all__") else is_here
        if name.startswith("_") or not is_public or not callable(value):
            continue
        yield module.__name__, name, value
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not method.startswith("_") and function.__module__.startswith("svae_jax"):
                own = method in vars(value)
                where = (module.__name__, f"{name}.{method}")
                yield *(where if own else (function.__module__, function.__qualname__)), function
