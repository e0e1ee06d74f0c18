"""Data sets of TFDS and the embedded one: their images, their order, and their errors."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svae_jax import data
from svae_jax.data import splits
from svae_jax.errors import UserError
from tests.real_data import real_data_dir


@pytest.fixture(scope="session")
def tfds():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()
    return tfds


@pytest.fixture(scope="session")
def tiny(tfds):
    """A function that prepares a data set from given rows."""

    class TinyBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent
        features: dict
        rows: list

        def _info(self):
            features = tfds.features.FeaturesDict(self.features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager):
            return {"train": enumerate(self.rows)}

        def _generate_examples(self):
            raise NotImplementedError

    def make(data_dir, name, features, rows, shards=1):
        members = {"name": name, "features": features, "rows": rows}
        builder = type(name, (TinyBuilder,), members, skip_registration=True)(data_dir=data_dir)
        config = tfds.download.DownloadConfig(num_shards=shards)
        builder.download_and_prepare(download_config=config)

    return make


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def places(tmp_path):
    return {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}


@pytest.fixture
def colour(tiny, tfds, places):
    """The 60 images of a data set `tiny_colour` in three files."""
    images = noise(0, 60, 6, 6, 3)
    feature = tfds.features.Image(shape=(6, 6, 3))
    tiny(places["data_dir"], "tiny_colour", {"image": feature}, [{"image": i} for i in images], 3)
    return images


def load_colour(places, split="train", **options):
    return data.load("tiny_colour", split, **{"image_shape": (6, 6, 3), **places, **options})


def shards(places, name="tiny_colour"):
    return sorted((Path(places["data_dir"]) / name / "1.0.0").glob("*.tfrecord*"))


def cached(places):
    directory = Path(places["cache_dir"])
    return [file.name for file in directory.glob("*") if file.suffix != ".lock"]


# The real sets


def test_cifar10_bit_for_bit(tfds, tmp_path):
    data_dir = real_data_dir("cifar10")
    for split in ("train[:64]", "train[-3:]+test[:5]"):
        expected = tfds.load("cifar10", split=split, data_dir=data_dir, batch_size=-1)
        images = data.load(
            "cifar10",
            split,
            image_shape=(32, 32, 3),
            data_dir=data_dir,
            cache_dir=str(tmp_path),
        )
        np.testing.assert_array_equal(images, tfds.as_numpy(expected)["image"])


def test_all_splits_in_a_row(tmp_path):
    options = {"image_shape": (32, 32, 3), "cache_dir": str(tmp_path)}
    options["data_dir"] = real_data_dir("cifar10")
    both = data.load("cifar10", "all[49998:50002]", **options)
    apart = data.load("cifar10", "train[49998:]+test[:2]", **options)
    np.testing.assert_array_equal(both, apart)


def test_celeb_a_is_cropped_to_the_face(tfds, tmp_path):
    import tensorflow as tf

    data_dir = real_data_dir("celeb_a")
    split = "validation[:24]"
    raw = tfds.load("celeb_a", split=split, data_dir=data_dir, batch_size=-1)["image"]
    faces = raw[:, 35:183, 15:163]
    assert faces.shape[1:] == (148, 148, 3)
    expected = tf.image.resize(faces, (64, 64), method="bicubic", antialias=True).numpy()
    options = {"image_shape": (64, 64, 3), "data_dir": data_dir}
    images = data.load("celeb_a", split, **options, cache_dir=str(tmp_path))
    difference = abs(images - expected.clip(0, 255))
    assert difference.mean() < 1
    assert difference.max() < 16  # two decoders of JPEG


def test_a_prepared_data_dir_is_only_read(colour, places):
    def snapshot():
        files = sorted(Path(places["data_dir"]).rglob("*"))
        return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]

    before = snapshot()
    load_colour(places)
    assert snapshot() == before


# Order and cache


def test_order_is_that_of_the_files(colour, places):
    assert len(shards(places)) == 3
    np.testing.assert_array_equal(load_colour(places), colour)
    np.testing.assert_array_equal(load_colour(places, "train[8:15]"), colour[8:15])
    np.testing.assert_array_equal(load_colour(places, "train[50%:]"), colour[30:])
    np.testing.assert_array_equal(load_colour(places, "all[-1:]"), colour[-1:])
    np.testing.assert_array_equal(load_colour(places, "train[:2]+train[:1]"), colour[[0, 1, 0]])
    assert not load_colour(places).flags.writeable


def test_cached_once(colour, places, monkeypatch):
    load_colour(places)
    monkeypatch.setattr(splits, "decode", None)
    np.testing.assert_array_equal(load_colour(places, "train[0:60]"), colour)
    assert len(cached(places)) == 1


def test_environment_names_the_directories(colour, places, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", places["data_dir"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    images = data.load("tiny_colour", "train", image_shape=(6, 6, 3))
    np.testing.assert_array_equal(images, colour)
    assert list((tmp_path / "xdg" / "svae_jax").glob("tiny_colour*.npy"))


def test_home_is_expanded(colour, places, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    images = load_colour(places, data_dir="~/data", cache_dir="~/elsewhere")
    np.testing.assert_array_equal(images, colour)
    assert list((tmp_path / "elsewhere").glob("tiny_colour*.npy"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    load_colour(places, cache_dir="")
    assert list((tmp_path / ".cache" / "svae_jax").glob("tiny_colour*.npy"))


def test_two_sets_of_one_name_and_version_are_told_apart(colour, places, tiny, tfds, tmp_path):
    other = noise(1, 60, 6, 6, 3)
    feature = tfds.features.Image(shape=(6, 6, 3))
    other_dir = str(tmp_path / "other")
    tiny(other_dir, "tiny_colour", {"image": feature}, [{"image": i} for i in other], 3)
    np.testing.assert_array_equal(load_colour(places), colour)
    np.testing.assert_array_equal(load_colour(places, data_dir=other_dir), other)


def test_sizes_and_kinds_get_arrays_of_their_own(colour, places):
    assert load_colour(places).shape == (60, 6, 6, 3)
    assert load_colour(places, image_shape=(4, 4, 3)).shape == (60, 4, 4, 3)
    assert load_colour(places, "train[:5]").shape == (5, 6, 6, 3)
    assert len(cached(places)) == 3


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_grey_set(tiny, tfds, places, caplog):
    images = noise(2, 4, 6, 6, 1)
    feature = tfds.features.Image(shape=(6, 6, 1))
    tiny(places["data_dir"], "tiny_grey", {"image": feature}, [{"image": i} for i in images])
    caplog.clear()
    loaded = data.load("tiny_grey", "train", image_shape=(6, 6, 1), **places)
    np.testing.assert_array_equal(loaded, images)
    assert not warnings(caplog)
    repeated = data.load("tiny_grey", "train", image_shape=(6, 6, 3), **places)
    np.testing.assert_array_equal(repeated, images.repeat(3, axis=-1))
    assert warnings(caplog) == ["tiny_grey/1.0.0 train: converted 4 grey to RGB"]


def test_colour_set_as_grey(colour, places, caplog):
    caplog.clear()
    grey = load_colour(places, image_shape=(6, 6, 1))
    np.testing.assert_allclose(grey[..., 0], colour @ [0.299, 0.587, 0.114], atol=0.51)
    assert warnings(caplog) == ["tiny_colour/1.0.0 train: converted 60 colour to grey"]


def test_set_with_alpha(tiny, tfds, places):
    images = noise(3, 4, 6, 6, 4)
    feature = tfds.features.Image(shape=(6, 6, 4))
    tiny(places["data_dir"], "tiny_alpha", {"image": feature}, [{"image": i} for i in images])
    loaded = data.load("tiny_alpha", "train", image_shape=(6, 6, 3), **places)
    share = images[..., 3:] / 255
    np.testing.assert_allclose(loaded, share * images[..., :3] + (1 - share) * 255, atol=0.51)


def test_records_are_decoded_as_tfds_decodes_them(tiny, tfds, places, tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6  # TFDS knows no orientation
    images = noise(4, 2, 6, 6, 4)
    files = [tmp_path / f"{number}.png" for number in range(2)]
    Image.fromarray(images[0, ..., :3]).save(files[0], exif=exif)
    Image.fromarray(images[1]).save(files[1])  # and drops alpha where 3 channels are declared
    rows = [{"image": str(file)} for file in files]
    tiny(places["data_dir"], "tiny_files", {"image": tfds.features.Image(shape=(6, 6, 3))}, rows)
    caplog.clear()
    loaded = data.load("tiny_files", "train", image_shape=(6, 6, 3), **places)
    stored = tfds.load("tiny_files", split="train", data_dir=places["data_dir"], batch_size=-1)
    np.testing.assert_array_equal(loaded, tfds.as_numpy(stored)["image"])
    assert not warnings(caplog)


# The embedded set


@pytest.fixture
def few_shapes(monkeypatch):
    from svae_jax.data.sources import shapes

    monkeypatch.setitem(shapes.SPLITS, "train", 12)
    monkeypatch.setitem(shapes.SPLITS, "test", 5)
    return shapes


def load_shapes(places, split="train"):
    return data.load("shapes", split, image_shape=(32, 32, 3), **places)


def test_shapes_are_prepared_in_the_cache(few_shapes, places):
    for split in ("train", "test"):
        count = few_shapes.SPLITS[split]
        expected = [few_shapes.scene(split, index)[0] for index in range(count)]
        np.testing.assert_array_equal(load_shapes(places, split), expected)
    assert not Path(places["data_dir"]).exists()


def test_shapes_keep_their_factors(few_shapes, places, tfds):
    load_shapes(places)
    stored = tfds.as_numpy(tfds.load("shapes", split="train", data_dir=places["cache_dir"]))
    for index, example in enumerate(stored):
        image, factors = few_shapes.scene("train", index)
        np.testing.assert_array_equal(example.pop("image"), image)
        assert example.keys() == factors.keys()
        for key, value in factors.items():
            np.testing.assert_array_equal(example[key], value)


def test_shapes_remove_leftovers_of_a_killed_process(few_shapes, places):
    leftover = Path(places["cache_dir"]) / "shapes" / "incomplete.ABC_1.0.0"
    leftover.mkdir(parents=True)
    assert len(load_shapes(places)) == 12
    assert not leftover.exists()


def test_shapes_where_nothing_can_be_written(few_shapes, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.cache_dir="):
        load_shapes({"cache_dir": str(tmp_path / "file")})


def test_shapes_on_a_disk_that_fills_up(few_shapes, places, monkeypatch):
    def full(split, index):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(few_shapes, "scene", full)
    with pytest.raises(UserError, match=r"No space left.*dataset\.cache_dir .* 50 MB"):
        load_shapes(places)
    assert not list(Path(places["cache_dir"]).rglob("*.tfrecord*"))


def test_shapes_whose_description_is_damaged(few_shapes, places):
    load_shapes(places)
    file = Path(places["cache_dir"]) / "shapes" / "1.0.0" / "dataset_info.json"
    file.write_text("{")
    with pytest.raises(UserError, match=r"dataset\.name='shapes'.*" + places["cache_dir"]):
        load_shapes(places)


@pytest.mark.slow
def test_all_shapes(places):
    assert load_shapes(places).shape == (20_000, 32, 32, 3)
    assert load_shapes(places, "test").shape == (2_000, 32, 32, 3)


# Errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_shape": (0, 6, 3)}, r"dataset\.height=0"),
        ({"image_shape": (6, -1, 3)}, r"dataset\.width=-1"),
        ({"image_shape": (6, 6, 2)}, r"dataset\.channels=2"),
        ({"split": "trian"}, r"dataset\.split.*'trian'.* has train \(60 images\)"),
        ({"split": "train["}, r"'train\['"),
        ({"split": "train[5:5]"}, "holds no image"),
        ({"split": "train[:61]"}, r"'train\[:61\]'"),
        ({"split": "train[:200%]"}, r"'train\[:200%\]'"),
    ],
)
def test_bad_requests(colour, places, options, match):
    with pytest.raises(UserError, match=match):
        load_colour(places, **options)
    assert not cached(places)


@pytest.mark.parametrize(
    ("name", "near"), [("cifar11", "cifar10"), ("shape", "shapes"), ("flder", "folder"), ("?", "")]
)
def test_unknown_sets(places, name, near):
    with pytest.raises(UserError, match=r"dataset\.name=.*" + near) as error:
        data.load(name, "train", image_shape=(32, 32, 3), **places)
    assert "\n" not in str(error.value)


def test_sets_without_one_image(tiny, tfds, places):
    number = tfds.features.Scalar(np.int64)
    image = tfds.features.Image(shape=(2, 2, 3))
    deep = tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16)
    pixels = noise(0, 2, 2, 3)
    rows = {
        "tiny_numbers": ({"a": number, "b": number}, {"a": 0, "b": 1}),
        "tiny_pairs": ({"left": image, "right": image}, {"left": pixels, "right": pixels}),
        "tiny_deep": ({"image": deep}, {"image": pixels[..., :1].astype(np.uint16)}),
        "tiny_both": ({"image": image, "mask": image}, {"image": pixels, "mask": 255 - pixels}),
    }
    for name, (features, row) in rows.items():
        tiny(places["data_dir"], name, features, [row])

    def load(name, channels=3):
        return data.load(name, "train", image_shape=(2, 2, channels), **places)

    with pytest.raises(UserError, match="hold no images"):
        load("tiny_numbers")
    with pytest.raises(UserError, match=r"hold left \(uint8\), right \(uint8\)"):
        load("tiny_pairs")
    with pytest.raises(UserError, match=r"hold image \(uint16\)"):
        load("tiny_deep", channels=1)
    np.testing.assert_array_equal(load("tiny_both")[0], pixels)


def test_a_set_that_cannot_be_downloaded(tfds, places, monkeypatch):
    class TinyRemote(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            features = {"image": tfds.features.Image(shape=(2, 2, 3))}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            manager.download("http://127.0.0.1:9/images.zip")  # nobody listens there

        def _generate_examples(self):
            raise NotImplementedError

    start = time.monotonic()
    with pytest.raises(UserError) as error:
        data.load("tiny_remote", "train", image_shape=(2, 2, 3), **places)
    assert time.monotonic() - start < 20
    message = str(error.value)
    for part in ("tiny_remote", places["data_dir"], "dataset.data_dir", "TFDS_DATA_DIR"):
        assert part in message
    assert "--config=shapes" in message
    assert "\n" not in message


def test_flipped_bit_in_a_record_file(colour, places):
    bad = shards(places)[1]
    good = bad.read_bytes()
    for position in (3, 9, len(good) // 2, len(good) - 2):
        content = bytearray(good)
        content[position] ^= 4
        bad.write_bytes(content)
        with pytest.raises(UserError, match=r"dataset\.name=.*damaged") as error:
            load_colour(places)
        assert bad.name in str(error.value)
        assert not cached(places)
    bad.write_bytes(good)
    np.testing.assert_array_equal(load_colour(places), colour)


def test_record_file_cut_short_or_gone(colour, places):
    bad = shards(places)[1]
    good = bad.read_bytes()
    record = 16 + int.from_bytes(good[:8], "little")  # length, its checksum, content, checksum
    for content in (good[:-1], good[: len(good) // 2], good[:record], b"", None):
        bad.unlink() if content is None else bad.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged or missing") as error:
            load_colour(places)
        assert bad.name in str(error.value)
        assert not cached(places)


def test_damaged_image_in_an_intact_record(tiny, tfds, places, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno image")
    feature = tfds.features.Image(shape=(2, 2, 3))
    rows = [{"image": noise(0, 2, 2, 3)}, {"image": str(broken)}]
    tiny(places["data_dir"], "tiny_broken", {"image": feature}, rows)
    with pytest.raises(UserError, match=r"1 of 2 images cannot be decoded: image 1 of tiny_broken"):
        data.load("tiny_broken", "train", image_shape=(2, 2, 3), **places)
    assert not cached(places)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_description(colour, places, name):
    file = Path(places["data_dir"]) / "tiny_colour" / "1.0.0" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"dataset\.name='tiny_colour'"):
        load_colour(places)


def test_full_disk(colour, places, monkeypatch):
    from types import SimpleNamespace

    from svae_jax import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"dataset\.cache_dir=.*room for .* MB") as error:
        load_colour(places)
    assert places["cache_dir"] in str(error.value)
    assert not cached(places)


# Imports and messages


def run(code, places):
    code = f"places = {json.dumps(places)}\n" + textwrap.dedent(code)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )


def test_a_cached_split_needs_no_tensorflow(colour, places):
    load_colour(places)
    code = """
        import sys
        from svae_jax import data
        assert "tensorflow_datasets" not in sys.modules
        images = data.load("tiny_colour", "train", image_shape=(6, 6, 3), **places)
        assert images.shape == (60, 6, 6, 3)
        assert "tensorflow" not in sys.modules
    """
    run(code, places)


def test_tfds_prints_nothing(places):
    code = """
        from absl import logging
        logging.set_verbosity(logging.INFO)
        from svae_jax.data.sources import shapes
        shapes.SPLITS.update(train=3, test=2)
        from svae_jax import data
        data.load("shapes", "train", image_shape=(32, 32, 3), **places)
    """
    result = run(code, places)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert "preparing shapes/1.0.0" in lines[0]
    assert "decoding shapes/1.0.0 train: 3 images" in lines[1]
