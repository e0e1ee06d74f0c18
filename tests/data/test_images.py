"""Arrays from Python: what is taken, what they hold, and the range that the model sees."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from svae_jax import data
from svae_jax.data import images as image_lib
from svae_jax.data import record as records
from svae_jax.data import splits
from svae_jax.data.images import Description
from svae_jax.errors import UserError
from svae_jax.pixels import DTYPES, UINT8, PixelRange

RNG = np.random.default_rng(0)
FLOATS = RNG.normal(size=(6, 4, 4, 2)).astype(np.float32)
LEVELS = RNG.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# What is taken.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_is_train_and_test_and_nothing_is_copied(dtype):
    train, test = LEVELS.astype(dtype), LEVELS[:2].astype(dtype)
    for pair in ((train, test), [train, test]):
        found = image_lib.from_python(pair)
        assert list(found) == ["train", "test"]
        for ours, theirs in zip(found.values(), pair, strict=True):
            assert ours.dtype == dtype
            assert np.shares_memory(ours, theirs)


def test_splits_have_the_names_that_they_are_given():
    found = image_lib.from_python({"train": LEVELS, "validation": LEVELS[:3], "late": LEVELS[:1]})
    assert {name: len(array) for name, array in found.items()} == {
        "train": 6, "validation": 3, "late": 1,
    }  # fmt: skip


def test_images_without_channels_get_one():
    found = image_lib.from_python((FLOATS[..., 0], FLOATS[:1, ..., 1]))
    assert (found["train"].shape, found["test"].shape) == ((6, 4, 4, 1), (1, 4, 4, 1))
    np.testing.assert_array_equal(found["train"][..., 0], FLOATS[..., 0])


def test_grey_images_need_no_copy_for_their_channel():
    grey = np.ascontiguousarray(FLOATS[..., 0])
    assert np.shares_memory(image_lib.from_python((grey, grey))["train"], grey)


@pytest.mark.parametrize("shape", [(6, 4, 4, 2), (6, 4, 4)])
def test_mapped_arrays_stay_mapped(tmp_path, shape):
    np.save(tmp_path / "a.npy", FLOATS.ravel()[: np.prod(shape)].reshape(shape))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for array in image_lib.from_python((mapped, mapped[2:])).values():
        assert isinstance(array, np.memmap)
        assert np.shares_memory(array, mapped)


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda a: a.astype(">f4"), lambda a: a[:, ::-1, ::-1]]
)
def test_any_layout_of_the_same_values_is_the_same(tmp_path, change):
    array = image_lib.from_python((change(FLOATS), change(FLOATS)))["train"]
    assert array.flags.c_contiguous
    assert array.dtype.isnative
    np.testing.assert_array_equal(array, change(FLOATS))
    plain = np.ascontiguousarray(change(FLOATS), np.float32)
    assert image_lib.describe(array, "", tmp_path) == image_lib.describe(plain, "", tmp_path)


def of_every_other_dtype():
    for dtype in ("int64", "int8", "bool", "complex64", "U3"):
        array = np.zeros((2, 4, 4, 3), dtype)
        yield dtype, (array, array), f"images: train has dtype {array.dtype}; possible are uint8"


ragged = [np.zeros((4, 4)), np.zeros((4, 5))]
BAD = [
    *of_every_other_dtype(),
    ("object", (np.array([*ragged, None], object)[:2], FLOATS), "dtype object.*one shape first"),
    ("ragged", (ragged, FLOATS), "images: train is not an array.*brought to one shape first"),
    ("rank 2", (FLOATS, FLOATS[0, 0]), r"test has shape \[4, 2\]; possible are \[N, H, W, C\] and"),
    ("rank 5", (FLOATS[None], FLOATS), r"train has shape \[1, 6, 4, 4, 2\]; possible are"),
    ("empty", (FLOATS, FLOATS[:0]), r"images: test is empty, of shape \[0, 4, 4, 2\]"),
    ("no pixels", (FLOATS[:, :0], FLOATS), r"images: train is empty, of shape \[6, 0, 4, 2\]"),
    ("shapes", (FLOATS, FLOATS[..., :1]), r"test is float32\[4, 4, 1\], but train is float32\[4, "),
    ("dtypes", (FLOATS, FLOATS.astype("f8")), r"test is float64\[4, 4, 2\], but train is float32"),
    ("one array", FLOATS, "give .train, test., or arrays by the names"),
    ("one of a pair", (FLOATS,), "give .train, test., or"),
    ("no pair", (FLOATS, FLOATS, FLOATS), "give .train, test., or"),
    ("text", "train.npy", "give .train, test., or"),
    ("no split", {}, "there is no split"),
    ("a number", {1: FLOATS}, "names of splits must be text, got 1"),
]


@pytest.mark.parametrize(("given", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_no_pair_of_images_is_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        image_lib.from_python(given)
    one_line(error)


def test_arrays_are_cut_as_data_sets_are():
    arrays = image_lib.from_python((LEVELS, LEVELS[::-1].copy()))
    load = splits.load_array
    assert load(arrays, "train") is arrays["train"]
    assert np.shares_memory(load(arrays, "train[2:4]"), LEVELS)
    np.testing.assert_array_equal(load(arrays, "train[2:4]"), LEVELS[2:4])
    np.testing.assert_array_equal(load(arrays, "train[:50%]+test[5:]"), LEVELS[[0, 1, 2, 0]])
    assert len(load(arrays, "all")) == 12
    with pytest.raises(UserError, match=r"'valid'.*arrays has train \(6 images\), test \(6 images"):
        load(arrays, "valid")
    with pytest.raises(UserError, match=r"'train\[:0\]': it holds no image"):
        load(arrays, "train[:0]")


# What they hold.


@pytest.fixture
def small_chunks(monkeypatch):
    """Two images a chunk of `FLOATS`, so that there are several."""
    monkeypatch.setattr(image_lib, "_CHUNK_BYTES", 2 * FLOATS[0].nbytes)


@pytest.fixture
def describe(tmp_path):
    return lambda array: image_lib.describe(array, "train", tmp_path / "cache")


def test_a_description_says_what_there_is(describe, small_chunks):
    found = describe(FLOATS[:5])
    assert found == (5, (4, 4, 2), "float32", found.digest, FLOATS[:5].min(), FLOATS[:5].max())
    assert len(found.digest) == 64
    levels = describe(LEVELS)
    assert (levels.dtype, levels.low, levels.high) == ("uint8", LEVELS.min(), LEVELS.max())
    assert Description.from_json(json.loads(json.dumps(found._asdict()))) == found


def test_the_digest_is_of_shape_dtype_and_every_value(describe, small_chunks):
    zeros = np.zeros((6, 4, 3, 2), np.uint8)
    others = [zeros, zeros[:5], zeros.reshape(6, 3, 4, 2)]
    others += [zeros.astype(dtype) for dtype in DTYPES[1:]]
    others.append(zeros.reshape(4, 6, 3, 2))
    for place in ((0, 0, 0, 0), (3, 1, 2, 1), (5, 3, 2, 1)):
        changed = zeros.copy()
        changed[place] = 1
        others.append(changed)
    digests = [describe(array).digest for array in others]
    assert len(set(digests)) == len(digests)
    assert describe(zeros.copy()).digest == digests[0]


def test_images_in_another_order_have_another_digest(describe, small_chunks):
    assert describe(FLOATS[[1, 0, *range(2, 6)]]).digest != describe(FLOATS).digest
    assert describe(FLOATS[[2, 3, 0, 1, 4, 5]]).digest != describe(FLOATS).digest  # whole chunks


def test_the_digest_is_the_same_wherever_images_come_from(describe, tmp_path, small_chunks):
    expected = describe(LEVELS)
    np.save(tmp_path / "a.npy", LEVELS)
    assert describe(np.load(tmp_path / "a.npy", mmap_mode="r")) == expected
    np.savez(tmp_path / "b.npz", LEVELS)
    assert describe(np.load(tmp_path / "b.npz")["arr_0"]) == expected
    both = np.memmap(tmp_path / "c.raw", np.uint8, "w+", 7, (12, *LEVELS.shape[1:]))
    both[3:9] = LEVELS
    assert describe(both[3:9]) == expected
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(LEVELS):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    places = {"data_dir": str(tmp_path / "folder"), "cache_dir": str(tmp_path / "cache")}
    read = data.load("folder", "all", image_shape=(4, 4, 3), order=data.BY_PATH, **places)
    assert isinstance(read, np.memmap)
    assert describe(read) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_not_finite_is_counted_and_found(describe, small_chunks, tmp_path, bad, mapped):
    array = FLOATS.copy()
    array[3, 2, 1, 1] = bad  # the first, in the second image of its chunk
    array[3, 2, 2, 0] = array[4, 0, 0, 0] = array[5, 3, 3, 1] = np.nan
    if mapped:
        np.save(tmp_path / "a.npy", array)
        array = np.load(tmp_path / "a.npy", mmap_mode="r")
    for _ in range(2):  # known by then, if mapped
        with pytest.raises(UserError, match="images: 4 values of train are NaN or infinite") as e:
            describe(array)
        assert "first at [3, 2, 1, 1]" in one_line(e)


def test_nothing_but_what_is_not_finite(describe):
    with pytest.raises(UserError, match=r"images: 192 values .* first at \[0, 0, 0, 0\]"):
        describe(np.full_like(FLOATS, np.nan))


# Mapped files are read once.


@pytest.fixture
def measured(monkeypatch):
    """The parts of arrays that were read."""
    parts, measure = [], image_lib._measure

    def watched(part):
        parts.append(part)
        return measure(part)

    monkeypatch.setattr(image_lib, "_measure", watched)
    return parts


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """A function that maps a file of 40 chunks of an image each."""
    monkeypatch.setattr(image_lib, "_CHUNK_BYTES", 1)
    np.save(tmp_path / "a.npy", RNG.integers(0, 256, (40, 4, 4, 3)).astype(np.uint8))
    return lambda mode="r": np.load(tmp_path / "a.npy", mmap_mode=mode)


def change(path, image, keeps_time):
    """Changes one value of an image of `mapped`, in place."""
    before = path.stat()
    array = np.load(path, mmap_mode="r+")
    array[image, 0, 0, 0] ^= 1
    array.flush()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keeps_time else 1)))


def test_a_known_file_is_spot_checked_and_not_read_again(describe, mapped, measured):
    found = describe(mapped())
    assert len(measured) == 40
    measured.clear()
    assert describe(mapped()) == found
    assert len(measured) == image_lib._SPOT_CHECKS == 8
    read = {int(np.flatnonzero((mapped() == part).all((1, 2, 3)))[0]) for part in measured}
    assert {0, 39} < read  # both ends, where files are cut or appended to


def test_arrays_in_memory_are_read_each_time(describe, measured):
    for _ in range(2):
        measured.clear()
        describe(LEVELS)
        assert sum(map(len, measured)) == len(LEVELS)


def test_a_changed_file_is_read_again(describe, mapped, measured, tmp_path, caplog):
    before = describe(mapped())
    measured.clear()
    change(tmp_path / "a.npy", 1, keeps_time=False)
    after = describe(mapped())
    assert len(measured) == 40
    assert after.digest != before.digest
    assert after == describe(np.array(mapped()))
    assert not warnings(caplog)


def test_a_change_that_kept_size_and_time_is_found_by_spot_checks(
    describe, mapped, tmp_path, caplog
):
    before = describe(mapped())
    change(tmp_path / "a.npy", 39, keeps_time=True)
    after = describe(mapped())
    assert after.digest != before.digest
    assert after == describe(np.array(mapped()))
    (warning,) = warnings(caplog)
    assert "the file of train changed although its time did not" in warning


def test_a_replaced_file_is_read_again(describe, mapped, measured, tmp_path):
    """With the size and the time of the one before, as `cp -p` and `rsync -t` make it."""
    path, before = tmp_path / "a.npy", describe(mapped())
    shutil.copy2(path, tmp_path / "b.npy")
    change(tmp_path / "b.npy", 1, keeps_time=True)
    (tmp_path / "b.npy").rename(path)
    measured.clear()
    assert describe(mapped()).digest != before.digest
    assert len(measured) == 40


def test_parts_of_one_file_are_known_one_by_one(describe, mapped):
    found = [describe(mapped()[a:b]) for a, b in ((0, 20), (20, 40), (0, 20))]
    assert found[0] == found[2]
    assert found[0].digest != found[1].digest
    assert found[1] == describe(np.array(mapped()[20:]))


def test_changes_in_memory_of_a_mapped_file_are_seen(describe, mapped):
    """Copy on write: the file stays as it is, and one chunk of five is spot-checked."""
    before, changed = describe(mapped()), mapped("c")
    changed[1, 0, 0, 0] ^= 1
    assert describe(changed) == describe(np.array(changed)) != before
    changed[1, 0, 0, 0] ^= 1
    assert describe(changed) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"[[1]]", b"{", b"null", b"[1, 2]"])
def test_a_damaged_memory_is_written_anew(describe, mapped, measured, tmp_path, content):
    found = describe(mapped())
    (memory,) = (tmp_path / "cache" / "described").iterdir()
    good = memory.read_bytes()
    memory.write_bytes(content)
    measured.clear()
    assert describe(mapped()) == found
    assert len(measured) == 40
    assert memory.read_bytes() == good


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_costs_time_alone(mapped, measured, tmp_path, place):
    (tmp_path / "file").touch()
    for _ in range(2):
        measured.clear()
        found = image_lib.describe(mapped(), "train", tmp_path / place)
        assert len(measured) == 40
    assert found == image_lib.describe(np.array(mapped()), "train", tmp_path)


# The range.


def described(array):
    return Description(
        len(array), array.shape[1:], array.dtype.name, "", float(array.min()), float(array.max())
    )


def test_all_levels_of_8_bits_are_the_default(caplog):
    assert image_lib.pixel_range(described(LEVELS), "") == UINT8
    dark = described((LEVELS // 2).astype(np.uint8))
    assert image_lib.pixel_range(dark, "") == UINT8
    assert not warnings(caplog)


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32", "float64"])
def test_other_dtypes_have_the_range_of_the_training_split(dtype, caplog):
    array = np.array([[[[7.0], [90.0]]]], dtype)
    assert image_lib.pixel_range(described(array), "") == PixelRange(dtype, 7.0, 90.0, True)
    assert not warnings(caplog)


@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8))
@settings(deadline=None)
def test_inferred_ranges_map_the_training_split_onto_its_ends(values):
    array = np.array(values, np.float32).reshape(-1, 1, 1, 1)
    assume(np.ptp(array) > 1e-4 * np.abs(array).max() > 1e-30)
    pixels = image_lib.pixel_range(described(array), "")
    floats = np.asarray(pixels.to_float(array))
    np.testing.assert_allclose([floats.min(), floats.max()], [-1, 1], atol=2e-3)


@pytest.mark.parametrize(
    ("array", "text", "expected"),
    [
        (LEVELS, "0,255", UINT8),
        (LEVELS // 200, "0,1", PixelRange("uint8", 0.0, 1.0)),
        (LEVELS.astype(np.uint16), " 0 , 4095 ", PixelRange("uint16", 0.0, 4095.0)),
        (FLOATS, "-8,8.5", PixelRange("float32", -8.0, 8.5)),
        (FLOATS, "-1e1,1e1", PixelRange("float32", -10.0, 10.0)),
    ],
)
def test_a_given_range_is_taken(array, text, expected):
    assert image_lib.pixel_range(described(array), text) == expected


@pytest.mark.parametrize(
    ("array", "text", "message"),
    [
        (FLOATS, "1", "must be LOW,HIGH, such as 0,4095, or empty"),
        (FLOATS, "0,1,2", "must be LOW,HIGH"),
        (FLOATS, "0,", "must be LOW,HIGH"),
        (FLOATS, "low,high", "must be LOW,HIGH"),
        (FLOATS, "1,0", "two finite numbers, LOW below HIGH, got 1.0,0.0"),
        (FLOATS, "2,2", "LOW below HIGH"),
        (FLOATS, "nan,1", "finite"),
        (FLOATS, "-inf,inf", "finite"),
        (LEVELS, "0,256", "two integers from 0 to 255, got 0,256"),
        (LEVELS, "-1,1", "two integers from 0 to 255, got -1,1"),
        (LEVELS, "0,254.5", "two integers from 0 to 255"),
        (LEVELS.astype(np.uint16), "0,65536", "two integers from 0 to 65535"),
    ],
)
def test_what_is_no_range_is_refused_by_name(array, text, message):
    with pytest.raises(UserError, match=message) as error:
        image_lib.pixel_range(described(array), text)
    assert one_line(error).startswith(f"dataset.value_range={text!r}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["", "0,200"])
def test_constant_images_are_refused(dtype, text):
    with pytest.raises(UserError, match="all values of the training split are 7: nothing to learn"):
        image_lib.pixel_range(described(np.full((3, 2, 2, 1), 7, dtype)), text)


@pytest.mark.parametrize(
    ("low", "high", "cure"),
    [
        (1e9, 1e9 + 1, "subtract their mean first"),
        (-1e9 - 1, -1e9, "subtract their mean first"),
        (0.0, 1e39, "rescale them first"),
        (-1e39, 0.0, "rescale them first"),
        (0.0, 1e-40, "rescale them first"),
    ],
)
def test_doubles_that_are_nothing_in_single_precision_are_refused(low, high, cure):
    array = np.array([low, high]).reshape(-1, 1, 1, 1)
    with pytest.raises(UserError, match=cure) as error:
        image_lib.pixel_range(described(array), "")
    one_line(error)
    shifted = (array - array.mean()) / np.ptp(array)
    floats = image_lib.pixel_range(described(shifted), "").to_float(shifted)
    np.testing.assert_allclose(np.ravel(floats), [-1, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("array", "text", "expected"),
    [
        (
            np.array([0, 4095], np.uint16),
            "0,65535",
            "0 to 4095 fill 6% of the range from 0 to 6553",
        ),
        (np.array([0, 62], np.uint8), "", "from 0 to 62 fill 24% of the range from 0 to 255"),
        (np.array([0.0, 0.1]), "-1,1", "from 0 to 0.1 fill 5% of the range from -1 to 1"),
    ],
)
def test_less_than_a_quarter_of_the_range_is_one_warning(array, text, expected, caplog):
    image_lib.pixel_range(described(array.reshape(-1, 1, 1, 1)), text)
    (warning,) = warnings(caplog)
    assert expected in warning
    assert "dataset.value_range=LOW,HIGH" in warning


def test_a_quarter_of_the_range_is_enough(caplog):
    image_lib.pixel_range(described(np.array([0, 64], np.uint8).reshape(-1, 1, 1, 1)), "")
    assert not warnings(caplog)


def beyond(pixels, is_given, array):
    image_lib.check_within(array, described(array), "the evaluation split", pixels, is_given)


def test_values_beyond_an_inferred_range_are_counted_in_one_line(caplog, small_chunks):
    train, held_out = FLOATS[:3], np.clip(FLOATS, -0.5, 9.0)
    held_out[[0, 3, 5], 1, 2, 0] = 10.0
    held_out[4, 0, 0, 1] = -11.0
    pixels = PixelRange("float32", -0.5, 9.0)
    beyond(pixels, False, train.clip(-0.5, 9.0))
    assert not warnings(caplog)
    beyond(pixels, False, held_out)
    (warning,) = warnings(caplog)
    assert "4 values of the evaluation split (from -11 to 10) lie beyond" in warning
    assert "-0.5 to 9" in warning
    assert float(pixels.to_float(held_out).max()) > 1  # mapped, not clipped


def test_values_beyond_a_given_range_are_refused(caplog):
    pixels = PixelRange("uint16", 0.0, 4095.0)
    for low, high in itertools.product((0, 1), (4094, 4095)):
        beyond(pixels, True, np.array([low, high], np.uint16).reshape(-1, 1, 1, 1))
    with pytest.raises(UserError, match="the evaluation split has values from 1 to 4096") as error:
        beyond(pixels, True, np.array([1, 4096], np.uint16).reshape(-1, 1, 1, 1))
    assert one_line(error).startswith("dataset.value_range=0,4095: ")
    assert not warnings(caplog)


# The record of both splits.


def test_a_record_survives_json_bit_by_bit(tmp_path):
    found = records.measure(FLOATS[:4], FLOATS[4:], "", tmp_path)
    found = found._replace(channel_basis=((0.1 + 0.2, 1 / 3), (-1 / 3, 0.3)))
    assert records.Record.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.pixels == PixelRange("float32", *found.value_range, True)
    plain = found._replace(channel_basis=None)
    assert records.Record.from_json(json.loads(json.dumps(plain.to_json()))) == plain


def test_a_record_is_of_both_splits(tmp_path, caplog):
    train, held_out = FLOATS[:4], 0.5 * FLOATS[4:]
    found = records.measure(train, held_out, "", tmp_path)
    assert (found.train.num_images, found.held_out.num_images) == (4, 2)
    assert found.value_range == (float(train.min()), float(train.max()))

    def check(held_out, value_range, is_strict=False):
        record = records.measure(train, held_out, value_range, tmp_path)
        records.check_values(record, train, held_out, is_strict)
        return record

    with pytest.raises(UserError, match="the training split has values from"):
        check(held_out, "-0.5,0.5")
    with pytest.raises(UserError, match="the evaluation split has values from"):
        check(100 * held_out, "-4,4")
    with pytest.raises(UserError, match="the evaluation split has values from"):
        check(100 * held_out, "", is_strict=True)
    assert not warnings(caplog)
    assert check(100 * held_out, "").value_range == found.value_range
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("fields", [{}, {"train": {}}, {"train": {"shape": 1}}])
def test_a_damaged_record_is_told(fields):
    with pytest.raises(UserError, match=r"data\.json is damaged .*use another --workdir"):
        records.Record.from_json({"channel_basis": None, "value_range": [0, 1], **fields})


def test_other_images_are_refused_by_the_names_of_their_splits(tmp_path):
    ours = records.measure(FLOATS[:4], FLOATS[4:], "", tmp_path)
    records.check_same(ours, ours, "run")
    for train, held_out, named in (
        (FLOATS[:3], FLOATS[4:], "dataset.split: 3 of float32[4, 4, 2], SHA-256"),
        (FLOATS[:4], FLOATS[5:], "dataset.eval_split: 1 of float32[4, 4, 2], SHA-256"),
        (FLOATS[:4, ..., :1], FLOATS[4:, ..., :1], "dataset.split: 4 of float32[4, 4, 1]"),
    ):
        theirs = records.measure(train, held_out, "", tmp_path)
        with pytest.raises(UserError, match="run: its run is of other images") as error:
            records.check_same(theirs, ours, "run")
        message = one_line(error)
        assert named in message
        assert ("dataset.split" in message) == (theirs.train != ours.train)
        assert ("dataset.eval_split" in message) == (theirs.held_out != ours.held_out)
