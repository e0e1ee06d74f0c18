"""`Run`: what a notebook does with a trained model."""

import json
import shutil

import jax
import numpy as np
import pytest

import svae_jax
from svae_jax import samplers
from svae_jax.analysis import drawing
from svae_jax.errors import UserError
from svae_jax.pixels import UINT8
from svae_jax.run import workdir


@pytest.fixture
def images(run):
    return run.images()[:6]


def test_it_unpacks_as_four_and_knows_its_data_and_samplers(run, trained_run):
    model, variables, config, step = svae_jax.load(trained_run)
    z = model.sample_prior(jax.random.key(0), 2)
    assert model.apply(variables, z, method="decode").shape == (2, 8, 8, 3)
    assert (config.dataset.height, step) == (8, 4)
    assert run.latent_shape == (3, 3, 4)
    assert run.samplers == ["prior", "gaussian"]
    np.testing.assert_array_equal(run.images("test[:2]"), run.images()[:2])


def test_encode_and_decode_are_the_models(run, images):
    encoding = run.encode(images)
    floats = UINT8.to_float(images)
    params = run.model.apply(run.variables, floats, method="encode")
    posterior = run.model.posterior
    np.testing.assert_allclose(encoding.mean, posterior.mean(params), atol=1e-5)
    np.testing.assert_allclose(encoding.stddev, posterior.stddev(params), rtol=1e-5)
    assert encoding.params.keys() == params.keys()
    decoded = run.model.apply(run.variables, posterior.mean(params), method="decode")
    np.testing.assert_allclose(run.decode(encoding.mean), 127.5 * (decoded + 1), atol=0.501)
    np.testing.assert_array_equal(run.decode(encoding.mean), run.reconstruct(images))


def test_any_number_of_images_goes_through_without_a_new_trace(run, images, caplog):
    many = np.concatenate([images] * 12)  # 72: more than two batches
    run.reconstruct(images[0])
    run.locality(images[0])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        all_at_once = run.reconstruct(many)
        run.kl_map(images[:3])
        run.edit(images, images[1], run.cell(0, 0))
        run.interpolate(images[0], images[1], 5, spherical=True)
        run.locality(images[:2])
    assert not [line for line in caplog.messages if "ompiling" in line]
    assert all_at_once.shape == (72, 8, 8, 3)
    _assert_close(all_at_once[66:], run.reconstruct(images))


def test_the_log_of_compilations_would_show_a_new_trace(caplog):
    """The test above can fail."""
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.jit(lambda x: x + 1)(np.zeros(17))
    assert [line for line in caplog.messages if "ompiling" in line]


def test_an_edit_of_all_cells_is_b_and_of_none_is_a_exactly(run, images):
    a, b = images[:3], images[3:]
    everything, nothing = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    np.testing.assert_array_equal(run.edit(a, b, everything), run.reconstruct(b))
    np.testing.assert_array_equal(run.edit(a, b, nothing), run.reconstruct(a))
    single = run.edit(a, b[0], run.feature_map(1))
    z = run.encode(a).mean
    z[..., 1] = run.encode(b[0]).mean[0, ..., 1]
    np.testing.assert_array_equal(single, run.decode(z))


def _assert_close(images, expected):
    """Equal but for rounding to the next level, where another batch computes another last bit."""
    assert images.dtype == expected.dtype == np.uint8
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_interpolation_begins_and_ends_at_the_reconstructions(run, images):
    ends = run.reconstruct(images[:2])
    for spherical in (False, True):
        path = run.interpolate(images[0], images[1], 5, spherical=spherical)
        _assert_close(path[[0, -1]], ends)
    cell = run.cell(2, 1)
    path = run.interpolate(images[0], images[1], 3, where=cell)
    _assert_close(path[0], ends[0])
    _assert_close(path[-1:], run.edit(images[0], images[1], cell))


def test_a_traversal_adds_multiples_of_a_direction(run, images):
    direction = run.directions(run.images(), count=2, where=run.cell(1, 1))[1]
    assert not direction[0].any()
    path = run.traverse(images[0], direction, [-1.0, 0.0, 2.0])
    _assert_close(path[1:2], run.reconstruct(images[0]))
    z = run.encode(images[0]).mean + 2 * direction
    _assert_close(path[2:], run.decode(z))


def test_samples_are_those_of_the_command(run):
    ours = run.sample(40, "gaussian", seed=3)
    fitted = run.sampler("gaussian")
    (theirs,) = drawing.draw(run, fitted, jax.random.key(3), 40)
    _assert_close(ours, UINT8.from_float(theirs))
    np.testing.assert_array_equal(
        run.sample(3, "gaussian", seed=3), run.sample(40, "gaussian", seed=3)[:3]
    )
    np.testing.assert_array_equal(run.sample(2, fitted, seed=3), run.sample(2, "gaussian", seed=3))
    mean = run.decode(np.zeros(run.latent_shape))
    _assert_close(run.sample(1, temperature=0.0), mean)
    assert set(run.samplers) < set(samplers.names())


def test_kl_maps_add_up_to_the_kl(run, images):
    found = run.kl_map(images)
    kl = run.model.posterior.kl(run.encode(images).params)
    np.testing.assert_allclose(found.per_location.sum((1, 2)), kl, rtol=1e-4)
    np.testing.assert_allclose(found.dependence, 0, atol=1e-3)
    corners = found.over_image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(corners, found.per_location[:, [0, 0, 2, 2], [0, 2, 0, 2]])


def test_dependence_between_locations_is_kept_apart(untrained, tiny_config, images):
    tiny_config.latent.update(name="mvn_full", lower_scale=1.0)
    run = untrained(tiny_config, scale=1.7)
    found = run.kl_map(images)
    kl = run.model.posterior.kl(run.encode(images).params)
    np.testing.assert_allclose(found.per_location.sum((1, 2)) + found.dependence, kl, rtol=1e-4)
    assert (found.dependence > 0.1).all()


MISTAKES = {
    "no cell": (lambda run, x: run.cell(3, 0), r"cell \(3, 0\) is not among the 3 x 3"),
    "no map": (lambda run, x: run.feature_map(4), "map 4 is not among the 4"),
    "mask shape": (
        lambda run, x: run.edit(x, x, np.ones((2, 2), bool)),
        r"\[3, 3\].*got.*\[2, 2\]",
    ),
    "mask type": (lambda run, x: run.edit(x, x, np.ones((3, 3))), "booleans .* got float64"),
    "edit of more": (lambda run, x: run.edit(x, x[:2], run.cell(0, 0)), "6 images a .* got 2"),
    "latents": (lambda run, x: run.decode(np.zeros((3, 4))), r"\[3, 4\].*\[3, 3, 4\] or \[b, 3, 3"),
    "NaN": (lambda run, x: run.decode(np.full((3, 3, 4), np.nan)), "latents: .* NaN or infinite"),
    "NaN along": (
        lambda run, x: run.traverse(x[0], np.ones((3, 3, 4)), [np.inf]),
        "latents: .* NaN or infinite",
    ),
    "two images": (lambda run, x: run.interpolate(x[:2], x[0]), "a must be one image, got 2"),
    "path of one": (lambda run, x: run.interpolate(x[0], x[0], 1), "num must be at least 2"),
    "one image": (lambda run, x: run.directions(x[0]), "2 images .* got 1"),
    "no samples": (lambda run, x: run.sample(0), "num must be at least 1"),
    "not fitted": (lambda run, x: run.sample(1, "flow"), "python -m svae_jax.fit_sampler"),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(run, images, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(run, images)
    assert "\n" not in str(error.value)


def test_a_run_gives_the_same_under_other_rules_of_numbers(trained_run, run, images):
    hole = np.zeros((8, 8), bool)
    hole[:4] = True
    calls = (
        lambda run: run.encode(images),
        lambda run: run.sample(2),
        lambda run: run.kl_map(images),
        lambda run: run.locality(images[:1]),
        lambda run: run.traverse(images[0], run.directions(images)[0]),
        lambda run: run.fill(images[0], hole),
        lambda run: run.display(images),
    )
    wanted = [call(run) for call in calls]
    rules = (jax.enable_x64(True), jax.numpy_dtype_promotion("strict"))
    with rules[0], rules[1], jax.numpy_rank_promotion("raise"):
        other = svae_jax.load(trained_run)
        found = [call(other) for call in calls]
    assert jax.tree.map(lambda x: np.asarray(x).dtype, found) == jax.tree.map(
        lambda x: np.asarray(x).dtype, wanted
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


DAMAGED = {"letters": b"\xff{}", "nested": b"[" * 100_000 + b"}"}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_metrics_are_one_line(copy, line):
    path = copy / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n{}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged .*; remove the damaged line"):
        svae_jax.load(copy).metrics()


@pytest.fixture
def copy(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "copy")


def test_a_run_of_an_older_version_loads(run, copy, images):
    path = copy / "config.json"
    fields = json.loads(path.read_text())
    del fields["importance_samples"], fields["optimizer"]["max_bad_steps"], fields["checkpoint"]
    path.write_text(json.dumps(fields))
    older = svae_jax.load(copy)
    np.testing.assert_array_equal(older.reconstruct(images), run.reconstruct(images))
    path.write_text(json.dumps(fields | {"of_the_future": 1}))
    with pytest.raises(UserError, match=r"unknown fields: of_the_future"):
        svae_jax.load(copy)


def test_a_run_that_is_in_use_loads(run, copy, images):
    with workdir.locked(copy):
        np.testing.assert_array_equal(
            svae_jax.load(copy).reconstruct(images), run.reconstruct(images)
        )


def test_a_damaged_checkpoint_is_left_out(copy, caplog):
    steps = sorted((copy / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for path in steps[-1].rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    assert svae_jax.load(copy).step == int(steps[-2].name)
    for step in steps[:-1]:
        shutil.rmtree(step)
    with pytest.raises(UserError, match=r"no intact checkpoint in .*copy"):
        svae_jax.load(copy)


def test_a_vector_is_one_cell(untrained, tiny_config, images):
    tiny_config.latent.update(name="vector", height=1, width=1, maps=22)
    tiny_config.model.parity_maps = 14
    run = untrained(tiny_config)
    found = run.locality(images[:1])
    assert found.energy.shape == (1, 1, 8, 8)
    assert found.own_share == found.uniform_own_share == 1.0
    np.testing.assert_array_equal(
        run.edit(images[0], images[1], run.cell(0, 0)), run.reconstruct(images[1])
    )
