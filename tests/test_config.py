"""Configurations: what the config files say, what is refused, and what may change on resume."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import celeba, cifar10, shapes
from svae_jax import command_line, latents, sampler_config
from svae_jax import config as configs
from svae_jax.errors import UserError
from svae_jax.model import stacks, vae
from svae_jax.model.layers import Style

README = (pathlib.Path(__file__).parents[1] / "configs" / "README.md").read_text()
FILES = {"celeba": celeba, "cifar10": cifar10, "shapes": shapes}


@pytest.mark.parametrize("name", latents.names())
@pytest.mark.parametrize("file", FILES)
def test_every_config_is_sound_for_every_posterior(file, name):
    config = FILES[file].get_config(name)
    configs.check(config)
    assert configs.model(config).posterior.name == name
    assert set(configs.flatten(config.to_dict())) == set(configs.flatten(configs.base().to_dict()))


def decoder_size(config):
    model = configs.model(config)
    path = model.linear.num_decoder_params if model.linear else 0
    return path + stacks.num_decoder_params(
        model.decoder.layers, model.posterior.maps, model.decoder.style
    )


@pytest.mark.parametrize(
    ("file", "arg"), [(file, arg) for file in (cifar10, shapes, celeba) for arg in file._MODELS]
)
def test_the_best_models_have_a_decoder_of_the_papers_size(file, arg):
    config = file.get_config(arg)
    configs.check(config)
    for paper in ("lowrank", "vector"):
        size = decoder_size(file.get_config(paper))
        assert decoder_size(config) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("file", FILES)
def test_the_sweep_of_linear_paths_keeps_the_decoders_size(file):
    size = decoder_size(FILES[file].get_config("lowrank"))
    trials = list(FILES[file].sweep_linear())
    assert len(trials) == (40 if FILES[file] is cifar10 else 32)
    for trial in trials:
        config = FILES[file].get_config(trial.pop("posterior"))
        config.update_from_flattened_dict(trial)
        configs.check(config)
        assert decoder_size(config) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("file", FILES)
def test_pca_in_closed_form_goes_with_every_schedule(file):
    flags = ["model.linear=pca", "model.encoder=none", "model.decoder=none"]
    flags += ["num_steps=0", "num_epochs=0"]
    assert " ".join(f"--config.{flag}" for flag in flags) in README
    config, _ = command_line.load_config(
        f"configs/{file}.py:mvn", [f"--config.{flag}" for flag in flags]
    )
    for schedule in ("constant", "cosine"):
        config.optimizer.schedule = schedule
        configs.check(config)
        configs.recipe(config, configs.num_steps(config, 1000))


def test_the_sweep_of_arithmetic_keeps_size_and_arithmetic_equal():
    """Equal up to a third: the decoders of `sweep_latents` take 8 to 17 million."""
    size = decoder_size(cifar10.get_config("lowrank"))
    for trial in cifar10.sweep_arithmetic():
        config = cifar10.get_config(trial["posterior"])
        config.model.decoder = trial["model.decoder"]
        assert decoder_size(config) == pytest.approx(size, rel=0.01)
        assert 15 < multiply_adds(config) / 1e6 < 20


def multiply_adds(config):
    """Of a decoder for an image, counted by XLA."""
    model = configs.model(config)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda k: vae.init(model, k, (32, 32, 3)), key)
    z = jax.eval_shape(lambda k: model.sample_prior(k, 100), key)
    decode = jax.jit(lambda v, x: model.apply(v, x, method="decode"))
    return decode.lower(variables, z).cost_analysis()["flops"] / 2 / 100


def test_an_unknown_posterior_is_told_of_the_best_models():
    with pytest.raises(
        UserError,
        match=r"'beast': it must be .*, best, best_vector, linear, .*, plain_vector, best_dense",
    ):
        cifar10.get_config("beast")


def test_typed_options():
    config = cifar10.get_config("lowrank_full,rank=2,d=4,N=16")
    found = {"name": "lowrank_full", "height": 4, "width": 4, "maps": 16, "rank": 2}
    assert config.latent.to_dict() == configs.base().latent.to_dict() | found
    assert config.model.parity_maps == 0
    vector = celeba.get_config("vector,C=90,N=32")
    assert (vector.latent.maps, vector.latent.height, vector.model.parity_maps) == (90, 1, 32)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("lowrang", "no posterior 'lowrang': it must be one of vector, naive, mvn"),
        ("lowrank,k=2", "no option 'k' for lowrank: it must be one of d, N, rank"),
        ("mvn,rank=2", "no option 'rank' for mvn: it must be one of d, N"),
        ("vector,d=3", "no option 'd' for vector: it must be one of C, N"),
        ("lowrank,rank=two", "option rank of lowrank must be an integer, got 'two'"),
        ("lowrank,rank=1.5", "must be an integer"),
        ("lowrank,rank", "must be an integer, got ''"),
    ],
)
def test_unknown_names_and_keys_are_refused_with_those_that_exist(arg, message):
    with pytest.raises(UserError, match=message):
        cifar10.get_config(arg)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latent.height", -3, "latent.height must be a positive integer, got height=-3"),
        ("latent.maps", 0, "latent.maps must be a positive integer, got maps=0"),
        (
            "latent.rank",
            4,
            r"latent.rank must be between 1 and min\(height, width\) = 3, got rank=4",
        ),
        ("latent.name", "gauss", "latent.name must be one of vector, naive"),
        (
            "latent.height",
            9,
            "model.decoder: latent.height must be 1 to 8, got 9: what .* grows to 32 pixels",
        ),
        ("objective.beta", math.nan, "objective.beta must be a finite number, 0 or above, got nan"),
        ("objective.sigma", "small", "objective.sigma must be"),
        (
            "optimizer.learning_rate",
            0.0,
            "optimizer.learning_rate must be above 0 and at most 1e30, got 0",
        ),
        ("optimizer.learning_rate", -1e-3, "optimizer.learning_rate must be"),
        ("optimizer.learning_rate", math.nan, "optimizer.learning_rate must be"),
        ("optimizer.learning_rate", 2e30, "optimizer.learning_rate must be"),
        ("optimizer.schedule", "linear", "optimizer.schedule must be .*'linear'"),
        ("optimizer.ema_decay", 1.0, "optimizer.ema_decay must be"),
        ("optimizer.clip_norm", -1.0, "optimizer.clip_norm must be"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps must be"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("log_every", 0, "log_every must be at least 1"),
        ("checkpoint.keep", 0, "checkpoint.keep must be at least 1"),
        ("num_epochs", 0.0, "num_steps=0 and num_epochs=0"),
        ("num_epochs", math.inf, "num_epochs must be"),
        ("num_steps", 2**31, "num_steps must be between -2.31 and 2.31, got 2147483648"),
        ("optimizer.warmup_steps", 2**40, "optimizer.warmup_steps must be between"),
        ("optimizer.warmup_steps", -(2**31), "must be between .*, got -2147483648"),
        ("checkpoint.keep", 2**70, "checkpoint.keep must be between"),
        ("model.encoder", "5x5/99999999999", "model.encoder: '5x5/99999999999': kernel, features"),
        ("seed", -1, "seed must be an integer from 0 to"),
        ("dataset.channels", 4, "dataset.channels must be 1"),
        ("dataset.height", 0, "dataset.height must be at least 1, got 0"),
        ("dataset.width", 480, "model.decoder: latent.width must be 14 to 120, got 3"),
        ("latent.cell", -1, "latent.cell must be 0"),
        ("model.head", "wide", "model.head must be one of dense, convolutional, got 'wide'"),
        ("dataset.resident_share", 1.5, "dataset.resident_share must be"),
        ("dataset.name", "", "dataset.name must be"),
        ("model.encoder", "5x5/32/s2 5x5", "model.encoder: '5x5' is not a layer"),
        ("model.norm", "layer", "model.norm must be one of batch, group, none, got 'layer'"),
        ("model.convolutions", "xla", "model.convolutions must be one of auto, lax, got 'xla'"),
        ("model.dtype", "float16", "model.dtype must be one of float32, bfloat16"),
        ("model.parity_maps", 8, "model.parity_maps must be 0 for all but the vector"),
        ("importance_samples", -1, "importance_samples must be"),
    ],
)
def test_bad_values_are_refused_by_field_value_and_cure(field, value, message):
    config = cifar10.get_config()
    section, _, name = field.rpartition(".")
    with (config[section] if section else config).unlocked():
        (config[section] if section else config)[name] = value
    with pytest.raises(UserError, match=message) as caught:
        configs.check(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "devices", "cure"),
    [
        (100, 8, "such as 96 or 104 (a run that has begun goes on with 5 of them"),
        (3, 4, "such as 4 (a run that has begun goes on with 3 of them"),
    ],
)
def test_batches_that_devices_cannot_share_are_refused_with_a_cure(batch_size, devices, cure):
    config = cifar10.get_config()
    config.batch_size = batch_size
    with pytest.raises(UserError, match=f"batch_size must be a multiple of the {devices}") as error:
        configs.check(config, num_devices=devices)
    assert cure in str(error.value)


def test_a_section_that_lost_its_fields_is_refused():
    config = cifar10.get_config()
    with config.unlocked():
        config.model = {"encoder": "auto"}
    with pytest.raises(
        UserError, match=r"config.model lacks model.activation, .*--config.model.act"
    ):
        configs.check(config)
    fit = sampler_config.base()
    with fit.unlocked():
        fit.flow = {}
    with pytest.raises(UserError, match=r"config.flow lacks flow\."):
        sampler_config.check(fit, "flow")


def test_values_of_another_type_are_refused():
    config = cifar10.get_config()
    with config.ignore_type():
        config.batch_size = True
    with pytest.raises(UserError, match="batch_size must be of type int, got True"):
        configs.check(config)


def test_an_integer_in_place_of_a_float_is_one_that_jax_holds():
    fields = configs.base().to_dict()
    fields["objective"]["beta"] = 2**70  # a ConfigDict made by hand keeps the integer
    with pytest.raises(
        UserError, match=r"objective.beta must be between -2\^31 and 2\^31, got 1180"
    ):
        configs.check(ml_collections.ConfigDict(fields))


def test_a_dictionary_is_no_configuration():
    # In a process of its own: here the types of arguments are checked before.
    code = "from svae_jax import config; config.check({'seed': 1})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = "UserError: a configuration is a ConfigDict, as of config.base(), got {'seed': 1}"
    assert line in found.stderr


def test_every_field_of_a_style_reaches_both_networks():
    config = cifar10.get_config("mvn")
    config.model.update(norm="group", activation="silu", dtype="bfloat16", convolutions="lax")
    model = configs.model(config)
    assert model.encoder.style == model.decoder.style == Style("group", "silu", "bfloat16", "lax")


def test_the_number_of_steps():
    config = cifar10.get_config()
    config.update(batch_size=100, num_epochs=1.5)
    assert configs.num_steps(config, 1050) == 15  # the remainder of an epoch is dropped
    config.num_steps = 7
    assert configs.num_steps(config, 1050) == 7
    with pytest.raises(UserError, match=r"batch_size=100 is above the 99 images of dataset.split"):
        configs.num_steps(config, 99)


def _learning_rates(config, num_steps):
    """The rates that Adam applies: the first update of a constant gradient has that length."""
    optimizer = configs.recipe(config, num_steps).optimizer
    params = {"w": jnp.ones(())}
    state, rates = optimizer.init(params), []
    for _ in range(num_steps):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    return np.array(rates)


def test_schedules():
    config = cifar10.get_config()
    config.optimizer.learning_rate = 0.5
    np.testing.assert_allclose(_learning_rates(config, 4), 0.5, rtol=1e-4)
    config.optimizer.warmup_steps = 2
    np.testing.assert_allclose(_learning_rates(config, 4), [0, 0.25, 0.5, 0.5], atol=1e-4)
    config.optimizer.schedule = "cosine"
    expected = [0, 0.25, 0.5, 0.25 * (1 + math.cos(math.pi / 2))]
    np.testing.assert_allclose(_learning_rates(config, 4), expected, atol=1e-4)
    with pytest.raises(UserError, match=r"optimizer.warmup_steps must be below num_steps=2, got 2"):
        configs.recipe(config, 2)


def test_clipping_bounds_the_gradient():
    config = cifar10.get_config()
    config.optimizer.clip_norm = 1.0
    optimizer = configs.recipe(config, 1).optimizer
    params = {"w": jnp.ones(4)}
    _, state = optimizer.update({"w": 100 * jnp.ones(4)}, optimizer.init(params), params)
    first_moment = state[1][0].mu["w"]
    np.testing.assert_allclose(first_moment, 0.1 * 0.5, rtol=1e-5)  # (1 − b1) · g / ‖g‖


def test_json_round_trip():
    config = shapes.get_config("lowrank,rank=2")
    again = configs.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    with pytest.raises(UserError, match=r"unknown fields: model.depth"):
        configs.from_dict({"model": {"depth": 3}})
    with pytest.raises(UserError, match=r"config.json"):
        configs.from_dict({"batch_size": "many"})


def test_runs_older_than_a_field_keep_what_they_had():
    config = shapes.get_config("lowrank_full")
    old = config.to_dict()
    del old["latent"]["nu_scale"], old["latent"]["lower_scale"]
    posterior = configs.model(configs.from_dict(old)).posterior
    assert posterior.mean_model.nu_scale == 0.1
    assert posterior.covariance_model.lower_scale == 1.0
    assert configs.model(config).posterior != posterior
    going_on = configs.continued(config, configs.from_dict(old))
    configs.check_continues(going_on, configs.from_dict(old))
    assert configs.model(going_on).posterior == posterior
    assert configs.continued(config, config).to_dict() == config.to_dict()
    config.latent.nu_scale = 0.5
    with pytest.raises(UserError, match=r"latent.nu_scale=0.5 \(was 0.1\)"):
        configs.check_continues(configs.continued(config, going_on), going_on)


FREE = {
    "log_every": 7, "eval_every": 7, "sample_every": 7, "importance_samples": 5,
    "checkpoint.every": 7, "checkpoint.keep": 1, "dataset.data_dir": "/elsewhere",
    "dataset.cache_dir": "/elsewhere", "dataset.resident_share": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(configs.flatten(configs.base().to_dict())))
def test_what_may_change_on_resume(field):
    """All fields: those that cannot change the numbers may differ, any other is named."""
    earlier, now = cifar10.get_config("lowrank"), cifar10.get_config("lowrank")
    value = configs.flatten(earlier.to_dict())[field]
    kind = type(value)
    other = {str: lambda: value + "x", bool: lambda: not value}.get(kind, lambda: value + 1)()
    changed = FREE.get(field, other)
    section, _, name = field.rpartition(".")
    (now[section] if section else now)[name] = changed
    if field in FREE or field in ("num_steps", "num_epochs"):
        configs.check_continues(now, earlier)
        assert configs.identity(now) == configs.identity(earlier)
    else:
        with pytest.raises(UserError, match=f"another configuration: {field}="):
            configs.check_continues(now, earlier)
        assert configs.identity(now) != configs.identity(earlier)


def test_a_run_may_grow_where_its_schedule_allows():
    earlier, now = cifar10.get_config(), cifar10.get_config()
    earlier.num_steps, now.num_steps = 100, 200
    configs.check_duration(now, earlier, 50_000)
    with pytest.raises(UserError, match=r"num_steps=100 \(was 200; it may only grow\)"):
        configs.check_duration(earlier, now, 50_000)
    for config in (earlier, now):
        config.optimizer.schedule = "cosine"
    with pytest.raises(UserError, match=r"optimizer.schedule='cosine' depends on it"):
        configs.check_duration(now, earlier, 50_000)


def test_more_epochs_than_steps_can_be_counted_are_refused():
    config = cifar10.get_config()
    config.update(num_steps=0, num_epochs=1e300)
    with pytest.raises(UserError, match=r"num_epochs=1e\+300 is more than 2\^31 training steps"):
        configs.num_steps(config, 50_000)
