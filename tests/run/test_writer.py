"""The files that scalars and pictures are written to and read from."""

import collections
import io
import json
import struct
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from svae_jax.errors import UserError
from svae_jax.run import writer as writer_module
from svae_jax.run.writer import Writer, truncate


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _rows(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _events(workdir):
    """The steps of each tag, as TensorBoard reads them from all files.

    Sorted: the files' names hold the second and a counter, so two of one second may be read as
    10 before 9.
    """
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(
        str(workdir), size_guidance={"tensors": 0}, purge_orphaned_data=False
    )
    accumulator.Reload()
    return {
        tag: sorted(event.step for event in accumulator.Tensors(tag))
        for tag in accumulator.Tags()["tensors"]
    }


def test_scalars_become_rows_and_curves(tmp_path):
    workdir = tmp_path / "deep" / "run"
    with Writer(workdir) as writer:
        writer.write_scalars(1, {"train/loss": jnp.float32(1.5), "train/kl": np.float64(0.1)})
        writer.write_scalars(1, {"eval/elbo": 2, "eval/bits_per_dim": jnp.float32("nan")})
        writer.write_scalars(2, {"train/loss": -np.inf})
        writer.flush()
        assert len(_rows(workdir)) == 3  # on disk before the close that a killed run never sees
        assert _events(workdir)["train/loss"] == [1, 2]
    assert _rows(workdir) == [
        {"step": 1, "train/loss": 1.5, "train/kl": 0.1},
        {"step": 1, "eval/elbo": 2, "eval/bits_per_dim": None},
        {"step": 2, "train/loss": None},
    ]
    expected = {"train/loss": [1, 2], "train/kl": [1], "eval/elbo": [1], "eval/bits_per_dim": [1]}
    assert _events(workdir) == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_the_grids(tmp_path, channels):
    grid = np.random.default_rng(0).integers(0, 256, (9, 7, channels), dtype=np.uint8)
    with Writer(tmp_path) as writer:
        writer.write_images(123, {"samples": grid, "reconstructions": 255 - grid})
    for name, expected in (("samples", grid), ("reconstructions", 255 - grid)):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["000123.png"]
        with Image.open(tmp_path / name / "000123.png") as picture:
            pixels = np.asarray(picture)
        np.testing.assert_array_equal(pixels.reshape(grid.shape), expected)
    assert _events(tmp_path) == {"samples": [123], "reconstructions": [123]}


def test_pictures_of_other_names_are_refused(tmp_path):
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match="drawings"):
        writer.write_images(1, {"drawings": np.zeros((2, 2, 1), np.uint8)})


def test_the_configuration_is_shown(tmp_path):
    with Writer(tmp_path) as writer:
        writer.write_config({"seed": 1, "latent.name": "lowrank", "latent.rank": None})
    content = b"".join(path.read_bytes() for path in tmp_path.glob("events*"))
    assert b"latent.name" in content
    assert b"lowrank" in content


def test_disabled_writes_nothing(tmp_path):
    workdir = tmp_path / "run"
    with Writer(workdir, enabled=False) as writer:
        writer.write_scalars(1, {"a": 1.0})
        writer.write_images(1, {"samples": np.zeros((2, 2, 1), np.uint8)})
        writer.write_config({"seed": 1})
        writer.flush()
    assert not workdir.exists()


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        Writer(tmp_path / "file" / "run")


def test_a_full_disk_surfaces_and_keeps_surfacing(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = Writer(tmp_path)
    writer.write_scalars(1, {"a": 1.0})
    deadline = time.monotonic() + 10
    while not writer._pending[0].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"):
        writer.write_scalars(2, {"a": 1.0})
    writer.write_images(3, {"samples": np.zeros((2, 2, 1), np.uint8)})
    with pytest.raises(UserError, match="No space left"):
        writer.close()


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(UserError, match="samples"), Writer(tmp_path) as writer:
        writer.write_images(3, {"samples": np.zeros((2, 2, 1), np.uint8)})


def test_event_files_that_cannot_be_written_are_named(tmp_path):
    writer = Writer(tmp_path / "run")
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("in the way")
    writer.write_config({"seed": 1})
    with pytest.raises(UserError, match="run"):
        writer.close()


def test_the_exception_that_ends_a_run_is_not_hidden(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = Writer(tmp_path)
    writer.write_scalars(1, {"a": 1.0})
    with pytest.raises(KeyError, match="the cause"), writer:
        raise KeyError("the cause")


def test_a_mistake_of_the_programmer_is_no_user_error(tmp_path):
    with pytest.raises(ValueError) as caught, Writer(tmp_path) as writer:  # noqa: PT011
        writer.write_scalars(1, {"a": np.ones(2)})
    assert not isinstance(caught.value, UserError)


def test_a_slow_disk_slows_the_run_and_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_MOST_PENDING", 2)
    writer = Writer(tmp_path)
    monkeypatch.setattr(writer, "_scalars", lambda *_: time.sleep(0.01))
    for step in range(10):
        writer.write_scalars(step, {})
        assert len(writer._pending) <= 3
    writer.close()


LIGHT = """
import sys
from svae_jax.run.writer import Writer
assert "tensorboard" not in sys.modules
with Writer({workdir!r}) as writer:
    writer.write_config({{"seed": 1}})
    writer.write_scalars(1, {{"a": 1.0}})
assert "tensorboard" in sys.modules
assert "tensorflow" not in sys.modules
"""


def test_tensorboard_is_imported_late_and_tensorflow_never(tmp_path):
    result = _python(LIGHT.format(workdir=str(tmp_path)))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def _summaries(workdir):
    """What the event files of a directory hold, but for times and groups: by step and tag."""
    from tensorboard.backend.event_processing import event_file_loader

    found = {}
    for path in workdir.glob("events*"):
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[event.step, value.tag] = value
    return found


def test_the_events_are_those_that_clu_writes(tmp_path):
    from clu import metric_writers
    from tensorboard.plugins.hparams import plugin_data_pb2
    from tensorboard.util import tensor_util

    scalars = {"train/loss": np.float32(0.1), "eval/elbo": -np.inf, "eval/kl": jnp.ones((1,))[0]}
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    config = {"seed": 1, "latent.name": "lowrank", "flip": True, "rate": 0.5}
    with Writer(tmp_path / "ours") as writer:
        writer.write_config(config)
        writer.write_scalars(3, scalars)
        writer.write_images(4, {"samples": picture})
    clu = metric_writers.SummaryWriter(str(tmp_path / "clu"))
    clu.write_hparams(config)
    clu.write_scalars(3, scalars)
    clu.write_images(4, {"samples": picture})
    clu.close()

    ours, others = _summaries(tmp_path / "ours"), _summaries(tmp_path / "clu")
    assert ours.keys() == others.keys()
    for key, value in ours.items():
        mine, theirs = value.metadata.plugin_data, others[key].metadata.plugin_data
        assert mine.plugin_name == theirs.plugin_name
        if mine.plugin_name == "hparams":
            shown = [
                plugin_data_pb2.HParamsPluginData.FromString(x.content) for x in (mine, theirs)
            ]
            assert shown[0].session_start_info.hparams == shown[1].session_start_info.hparams
        elif mine.plugin_name == "scalars":
            arrays = [tensor_util.make_ndarray(x.tensor) for x in (value, others[key])]
            np.testing.assert_array_equal(*arrays)
            assert arrays[0].dtype == arrays[1].dtype == np.float32
        else:
            (width, height, png), (*size, _) = (
                tensor_util.make_ndarray(x.tensor) for x in (value, others[key])
            )
            assert [width, height] == size == [b"7", b"5"]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), picture)
    assert {value.metadata.plugin_data.plugin_name for value in ours.values()} == {
        "hparams", "images", "scalars",
    }  # fmt: skip


# --- resuming ---


def _run(workdir, steps):
    """A run that logs at every step, evaluates and draws at every second, and is then killed."""
    picture = np.zeros((3, 3, 3), np.uint8)
    with Writer(workdir) as writer:
        if steps[0] == 0:
            writer.write_config({"seed": 0})
        for step in steps:
            writer.write_scalars(step, {"train/loss": step})
            if step % 2 == 0:
                writer.write_scalars(step, {"eval/elbo": step})
                writer.write_images(step, {"samples": picture})


def _tear(path, kept):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - kept])


def _assert_whole(workdir, last):
    every, second = list(range(last + 1)), list(range(0, last + 1, 2))
    events = _events(workdir)
    config = [tag for tag in events if tag.startswith("_hparams_")]
    assert len(config) == 1
    assert events.pop(config[0]) == [0]
    assert events == {"train/loss": every, "eval/elbo": second, "samples": second}
    steps = collections.Counter(row["step"] for row in _rows(workdir))
    assert steps == {step: 2 if step % 2 == 0 else 1 for step in every}
    assert sorted(int(path.stem) for path in (workdir / "samples").iterdir()) == second


@pytest.mark.parametrize("torn", [0, 1, 7, 30])
def test_a_resumed_run_shows_each_step_once(tmp_path, torn):
    _run(tmp_path, range(8))
    for path in (tmp_path / "metrics.jsonl", *tmp_path.glob("events*")):
        _tear(path, torn)
    (tmp_path / "samples" / "000002.png.tmp").write_bytes(b"torn")
    truncate(tmp_path, 4)
    _run(tmp_path, range(5, 10))
    _assert_whole(tmp_path, 9)
    # And once more, now with two event files of which one is behind the step.
    truncate(tmp_path, 7)
    _run(tmp_path, range(8, 11))
    _assert_whole(tmp_path, 10)


def test_without_truncate_the_curve_would_be_doubled(tmp_path):
    _run(tmp_path, range(3))
    _run(tmp_path, range(1, 3))
    assert _events(tmp_path)["train/loss"] == [0, 1, 1, 2, 2]


def test_nothing_stays_of_a_run_that_starts_anew(tmp_path):
    _run(tmp_path, range(3))
    truncate(tmp_path, -1)
    assert [path.name for path in tmp_path.rglob("*")] == ["samples"]
    truncate(tmp_path / "missing", -1)


def test_truncating_at_the_end_changes_no_byte(tmp_path):
    _run(tmp_path, range(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    truncate(tmp_path, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_only_a_runs_own_pictures_go(tmp_path):
    kept = [tmp_path / "samples" / "best.png", tmp_path / "mine" / "000009.png"]
    for path in (*kept, tmp_path / "samples" / "000009.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    truncate(tmp_path, 4)
    assert sorted(tmp_path.rglob("*.png")) == sorted(kept)


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 2, "a"',
        b'{"step": 2}',  # whole, but for its end of line: the next row would join it
        b'{"a": 2}\n',
        b"7\n",
        b"\0" * 40,
    ],
    ids=["cut", "no end of line", "no step", "no object", "zeros"],
)
def test_a_torn_row_goes(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    truncate(tmp_path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_damaged_row_takes_no_other_with_it(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"st\xffp": 2}\n{"step": 3}\n'
    path.write_bytes(whole + b'{"step": 6}\n')
    truncate(tmp_path, 5)
    assert path.read_bytes() == whole
    assert "line 2 is damaged" in caplog.text


@pytest.mark.parametrize(
    "tail",
    [
        b"\0" * 64,  # what a power failure leaves
        struct.pack("<QI", 1 << 60, 0),  # a length that is none: nothing so large is read
        b"\x05",
    ],
    ids=["zeros", "length", "cut"],
)
def test_a_torn_event_goes(tmp_path, tail):
    _run(tmp_path, range(3))
    (path,) = tmp_path.glob("events*")
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    truncate(tmp_path, 5)
    assert path.read_bytes() == whole


def test_what_cannot_be_truncated_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        truncate(tmp_path, 1)


# ---------------------------------------------------------------------------------- no TensorBoard


def test_without_tensorboard_all_but_the_events_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    picture = np.zeros((4, 4, 3), np.uint8)
    with Writer(tmp_path) as writer:
        writer.write_config({"seed": 0})
        writer.write_scalars(1, {"train/loss": 1.0})
        writer.write_images(1, {"samples": picture})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples"]
    (line,) = (record.message for record in caplog.records)
    assert "metrics.jsonl alone, not to TensorBoard" in line
    assert "tensorboard" in line


def test_events_of_another_machine_do_not_stop_a_run_without_tensorboard(
    tmp_path, monkeypatch, caplog
):
    _run(tmp_path, range(3))
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    truncate(tmp_path, 1)
    assert {row["step"] for row in _rows(tmp_path)} == {0, 1}
    assert "may hold steps after 1" in caplog.text
