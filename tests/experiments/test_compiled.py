"""What XLA's compilers say of a train step on devices that are not there."""

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.compiled import __main__ as command
from experiments.compiled import compiling, targets
from experiments.compiled.hlo import Program
from svae_jax.devices import sharding
from svae_jax.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))

NUM_IMAGES = 100_000
# Rows of no multiple of 128 bytes: a TPU would rather keep the columns of the data set together.
DATA_BYTES = NUM_IMAGES * 28 * 28 * 3
TINY = (
    "--config=configs/shapes.py:lowrank,N=4",
    "--config.dataset.height=28",
    "--config.dataset.width=28",
    "--config.model.encoder=3x3/4/s2 3x3/8/s2",
    "--config.model.decoder=3x3/6 3x3/4 7x7/4/valid 3x3/image/s2",
    "--config.batch_size=12",
    f"--images={NUM_IMAGES}",
)
MOST_KERNELS = 116  # of a step on each of two GPUs
# Exchanges a step: two for each of five batch norms, one for the loss, one for the gradients.
EXCHANGES = {"h200:2": 12, "v5e:2x2": 12}


def _has(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The command's JSON for two GPUs and four TPU chips, by target."""
    if not (_has("libtpu") and _has("jax_plugins.xla_cuda13")):
        pytest.skip("the compilers are missing: pip install -e '.[compiled]'")
    path = tmp_path_factory.mktemp("compiled") / "found.json"
    command_line = [sys.executable, "-m", "experiments.compiled", *TINY, f"--json={path}"]
    asked = [f"--target={target}" for target in EXCHANGES]
    done = subprocess.run(
        [*command_line, *asked],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["targets"]


@pytest.mark.parametrize("target", EXCHANGES)
def test_no_call_copies_the_data_set(compiled, target):
    found = compiled[target]["train_step"]
    assert found["memory"]["arguments"] > DATA_BYTES
    assert found["largest_outside_loop"] < DATA_BYTES / 100
    assert found["memory"]["temporaries"] < DATA_BYTES / 4


@pytest.mark.parametrize("target", EXCHANGES)
def test_a_step_exchanges_no_more_than_it_did(compiled, target):
    step = compiled[target]["train_step"]
    exchanges = step["collectives"]
    assert 0 < exchanges["all-reduce"] <= sum(exchanges.values()) <= EXCHANGES[target]


def test_a_step_on_a_gpu_has_few_kernels(compiled):
    step = compiled["h200:2"]["train_step"]
    assert step["kernels_by_kind"]["convolution"] == 17
    assert step["kernels"] <= MOST_KERNELS


def test_only_a_tpu_tells_its_cycles(compiled):
    assert compiled["h200:2"]["train_step"]["estimated_cycles"] is None
    assert compiled["v5e:2x2"]["train_step"]["estimated_cycles"] > 0


def test_products_in_a_loop_are_counted_once_a_pass():
    """Against the arithmetic of two products and a convolution, compiled for this machine."""

    def body(_, x):
        image = x.reshape(1, 8, 8, 4)
        kernel = jnp.ones((3, 3, 4, 4))
        image = jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(image.reshape(16, 16) @ x) @ x

    def function(x, many):
        return jax.lax.fori_loop(0, 3, body, x), jnp.sort(many, axis=0)

    shapes = jnp.ones((16, 16)), jnp.ones((1000, 100))
    found = compiling.Compiled(sharding.make_mesh(), jax.jit(function), *shapes)
    inside = 3 * 8 - 2  # taps along a side that meet the image, not its padding
    sort = math.ceil(math.log2(100_000)) * 100_000  # as XLA counts it
    expected = 2 * (2 * 16**3) + 2 * inside**2 * 4 * 4
    assert expected <= found.flops - sort <= 1.001 * expected  # a counter besides
    assert found.program.outside[0].bytes_made == 4 * 100_000


HLO = """\
HloModule example

%fused (image: u8[9,4], at: s32[]) -> f32[2,4] {
  %image = u8[9,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = u8[2,4]{1,0} dynamic-slice(%image, %at, %zero), dynamic_slice_sizes={2,4}
  ROOT %float = f32[2,4]{1,0} convert(%slice)
}

ENTRY %main (images: u8[9,4], start: s32[]) -> f32[2,4] {
  %images = u8[9,4]{1,0} parameter(0)
  %start = s32[] parameter(1)
  %fusion = f32[2,4]{1,0} fusion(%images, %start), kind=kLoop, calls=%fused
  %all-reduce-start = f32[2,4]{1,0} all-reduce-start(%fusion), to_apply=%add
  %all-reduce-done = f32[2,4]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %copy = f32[2,4]{0,1} copy(%all-reduce-done), backend_config={"estimated_cycles":"70"}
}
"""


def test_a_sliced_array_counts_as_its_slice():
    cost = Program(HLO)
    assert cost.kernels == {"fusion": 1, "all-reduce": 1, "copy": 1}
    assert cost.collectives == {"all-reduce": 1}
    assert cost.estimated_cycles == 70
    fusion = 2 * 4 + 4 + 4 * 2 * 4  # the slice, where it starts, and its floats
    assert cost.bytes_moved == fusion + 2 * (2 * 4 * 2 * 4)
    assert cost.outside == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=k40"], "must be one of h200"),
        (["--target=h200:2x2"], "h200:4"),
        (["--target=v5e:two"], "v5e:2x2"),
        ([], "--target"),
        (["--target=h200", "--config=configs/no.py"], "there is no such file"),
        (["--target=h200", "--config.N=3"], "N"),
        (["--target=h200", "--batch=3"], "Unknown command line flag 'batch'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        command.main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("target", "package"), [("h200", "jax-cuda13-plugin"), ("v5e", "libtpu")])
def test_a_missing_compiler_is_named(monkeypatch, target, package):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=rf"{package}; pip install -e '.\[compiled\]'"):
        targets.devices(target)
