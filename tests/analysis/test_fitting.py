"""Fitting samplers to a run: resuming, what is refused, and the command line."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import svae_jax
from svae_jax import sampler_config, samplers
from svae_jax.analysis import fitted, fitting, trained
from svae_jax.errors import UserError
from svae_jax.run import checkpoint, workdir
from svae_jax.training import loop
from tests import command_line

KEY = jax.random.key(0)


def tiny(name, **changed):
    """The configuration of a fit that takes seconds."""
    config = sampler_config.base()
    if name == "mixture":
        config.mixture.components = 2
    if "flow" in name:
        config[name].update(width=8, depth=1, num_params=2000, num_steps=5, batch_size=4)
        config[name].update(log_every=1, checkpoint_every=2)
        config[name].update(changed)
    return config


@pytest.fixture
def run(tiny_config, tmp_path, tmp_path_factory):
    """The workdir of a finished run, trained once for all tests."""
    whole = tmp_path_factory.getbasetemp() / "run_for_samplers"
    if not whole.exists():
        tiny_config.update(num_steps=2, eval_every=2, sample_every=2)
        loop.train(tiny_config, whole)
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", samplers.names())
def test_a_fitted_sampler_is_loaded_in_one_call(run, name):
    trained = svae_jax.load(run)
    if name != "prior":
        result = fitting.fit(run, name, tiny(name))
        assert (result["sampler"], result["step"]) == (name, 2)
        assert result["parameters"] > 0
    options = {"ode_steps": 2} if "flow" in name else {}  # of 12, which take long
    sampler = fitted.load_sampler(run, name, trained, **options)
    z = sampler(KEY, 7)
    assert z.shape == (7, 3, 3, 4)
    assert np.all(np.isfinite(z))
    np.testing.assert_array_equal(sampler(KEY, 2, first=5), z[5:])


def test_options_for_drawing_are_given_when_loading(run):
    trained = svae_jax.load(run)
    fitting.fit(run, "flow", tiny("flow"))
    plain = fitted.load_sampler(run, "flow", trained, ode_steps=2)
    for changed in ({"ode_steps": 1}, {"ode_steps": 2, "noise": True}):
        other = fitted.load_sampler(run, "flow", trained, **changed)
        assert changed.items() <= dataclasses.asdict(other.sampler).items()
        assert not np.allclose(plain(KEY, 3), other(KEY, 3))
    cold = fitted.load_sampler(run, "prior", trained, temperature=0.0)
    np.testing.assert_array_equal(cold(KEY, 3), 0)
    fitting.fit(run, "gaussian", tiny("gaussian"))
    with pytest.raises(UserError, match="gaussian has no option noise; its options: none"):
        fitted.load_sampler(run, "gaussian", trained, noise=True)
    with pytest.raises(UserError, match="temperature must be 0 or above"):
        fitted.load_sampler(run, "prior", trained, temperature=-1.0)


class Interrupted(Exception):
    pass


def _fingerprint(run):
    return checkpoint.fingerprint(checkpoint.load(run / "samplers" / "flow" / "checkpoints").state)


def test_a_flow_is_the_same_under_other_rules_of_numbers(run, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    fitting.fit(plain, "flow", tiny("flow"))
    rules = (jax.enable_x64(True), jax.numpy_dtype_promotion("strict"))
    with rules[0], rules[1], jax.numpy_rank_promotion("raise"):
        fitting.fit(run, "flow", tiny("flow"))
        drawn = svae_jax.load(run).sample(2, "flow", ode_steps=2)
    assert _fingerprint(run) == _fingerprint(plain)
    np.testing.assert_array_equal(drawn, svae_jax.load(plain).sample(2, "flow", ode_steps=2))


@pytest.mark.usefixtures("optimised", "fresh_programs")
def test_interrupted_anywhere_a_flow_ends_in_the_same_bits(run, monkeypatch):
    """Also one that is logged and saved at other steps."""
    fitting.fit(run, "flow", tiny("flow"))
    whole = _fingerprint(run)
    step = samplers.Flow.step
    for last in range(5):
        shutil.rmtree(run / "samplers")

        def dying(self, state, posteriors, count, last=last):
            if int(state.state.step) == last:
                raise Interrupted
            return step(self, state, posteriors, count)

        with monkeypatch.context() as patch:
            patch.setattr(samplers.Flow, "step", dying)
            with pytest.raises(Interrupted):
                fitting.fit(run, "flow", tiny("flow"))
        if last >= 2:
            with pytest.raises(UserError, match="the fit of the sampler flow stopped at step"):
                fitted.load_sampler(run, "flow", svae_jax.load(run))
        fitting.fit(run, "flow", tiny("flow"))
        assert _fingerprint(run) == whole
    shutil.rmtree(run / "samplers")
    fitting.fit(run, "flow", tiny("flow", log_every=3, checkpoint_every=100))
    assert _fingerprint(run) == whole


def test_a_finished_fit_returns_at_once(run, monkeypatch):
    result = fitting.fit(run, "gaussian", tiny("gaussian"))
    monkeypatch.setattr(fitting, "_posteriors", None)
    assert fitting.fit(run, "gaussian", tiny("gaussian")) == result


def test_the_workdir_may_be_in_use_but_not_the_samplers_directory(run):
    with workdir.locked(run):
        fitting.fit(run, "gaussian", tiny("gaussian"))
    folder = run / "samplers" / "gaussian"
    with workdir.locked(folder), pytest.raises(UserError, match="is in use by"):
        fitting.fit(run, "gaussian", tiny("gaussian"))


def test_a_sampler_of_another_checkpoint_is_refused_and_fitted_anew(run, capsys):
    fitting.fit(run, "gaussian", tiny("gaussian"))
    first = svae_jax.load(run)
    changed = dataclasses.replace(
        first, variables=jax.tree.map(lambda leaf: leaf + 1, first.variables)
    )
    cure = f"python -m svae_jax.fit_sampler --workdir={run} --sampler=gaussian"
    with pytest.raises(UserError, match="is fitted to another checkpoint") as caught:
        fitted.load_sampler(run, "gaussian", changed)
    assert str(caught.value).endswith(cure)
    # The run trains on.
    loaded = checkpoint.load(run / "checkpoints")
    with checkpoint.Checkpointer(run / "checkpoints") as checkpoints:
        state = jax.tree.map(lambda leaf: leaf * 2, loaded.state)
        checkpoints.save(3, state, config=loaded.config)
    with pytest.raises(UserError, match=r"\(step 2\) than the one loaded \(step 3\)"):
        fitted.load_sampler(run, "gaussian", svae_jax.load(run))
    assert fitting.fit(run, "gaussian", tiny("gaussian"))["step"] == 3
    assert "gaussian of step 2 is replaced by one of step 3" in capsys.readouterr().err
    fitted.load_sampler(run, "gaussian", svae_jax.load(run))


def test_a_damaged_sampler_is_not_loaded(run):
    fitting.fit(run, "gaussian", tiny("gaussian"))
    folder = run / "samplers" / "gaussian"
    for path in (folder / "checkpoints" / "1" / "meta").iterdir():
        path.write_text("{")
    for call in (
        lambda: fitted.load_sampler(run, "gaussian", svae_jax.load(run)),
        lambda: fitting.fit(run, "gaussian", tiny("gaussian")),
    ):
        with pytest.raises(UserError, match=f"no intact checkpoint.*or delete {folder}"):
            call()


def test_what_is_not_fitted_is_refused_with_the_command_that_fits_it(run):
    for name in ("gaussian", "mixture", "flow"):
        with pytest.raises(UserError, match=f"the sampler {name} is not fitted; ") as caught:
            fitted.load_sampler(run, name, svae_jax.load(run))
        assert str(caught.value).endswith(f"--workdir={run} --sampler={name}")
    with pytest.raises(UserError, match="--sampler=flaw must be one of prior, gaussian"):
        fitted.load_sampler(run, "flaw", svae_jax.load(run))


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("prior", {}, "--sampler=prior needs no fit"),
        ("flaw", {}, "--sampler=flaw must be one of prior, gaussian, kronecker, mixture, flow"),
        ("flow", {"flow.num_steps": 0}, "flow.num_steps must be at least 1, got 0"),
        ("flow", {"flow.num_params": 1}, "flow.num_params must be at least"),
        ("flow", {"flow.learning_rate": -1.0}, "flow.learning_rate must be above 0"),
        ("flow", {"flow.ema_decay": 1.0}, "flow.ema_decay must be 0 or above, below 1"),
        ("flow", {"seed": -1}, "seed must be an integer from 0"),
        ("mixture", {"mixture.share": 0.0}, "mixture.share must be above 0"),
        ("mixture", {"mixture.components": 100}, "mixture.components must be at most"),
        ("gaussian", {"flow.depth": 2}, "flow.depth=2 is a setting of --sampler=flow"),
    ],
)
def test_bad_settings_are_refused(run, name, changed, message):
    config = sampler_config.base()
    config.update_from_flattened_dict(changed)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        fitting.fit(run, name, config)
    assert "\n" not in str(caught.value)


def test_other_settings_are_refused_and_named(run):
    fitting.fit(run, "flow", tiny("flow"))
    with pytest.raises(UserError, match=r"other settings: flow.num_steps=6 \(was 5\); set them"):
        fitting.fit(run, "flow", tiny("flow", num_steps=6))


def test_a_fit_of_another_version_is_refused(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(samplers.Flow, "version", 1)
        fitting.fit(run, "flow", tiny("flow"))
    with pytest.raises(UserError, match="fitted by another version of svae_jax; delete it to fit"):
        fitting.fit(run, "flow", tiny("flow"))
    with pytest.raises(UserError, match="the sampler flow was fitted by another version of svae_j"):
        fitted.load_sampler(run, "flow", trained.load(run))


def test_a_loss_that_is_not_finite_ends_the_fit(run):
    with pytest.raises(UserError, match=r"the loss was not finite by step \d; lower flow.learn"):
        fitting.fit(run, "flow", tiny("flow", learning_rate=1e30))


# The command line.


def _start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "svae_jax.fit_sampler", *args],
        cwd=command_line.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_signal_saves_and_the_same_command_goes_on(run):
    changed = {
        k: v for k, v in sampler_config.identity(tiny("flow"), "flow").items() if k != "seed"
    }
    changed |= {"flow.num_steps": 100_000, "flow.log_every": 1, "flow.checkpoint_every": 100_000}
    args = (
        f"--workdir={run}",
        "--sampler=flow",
        *(f"--config.{k}={v}" for k, v in changed.items()),
    )
    process = _start(*args)
    assert process.stderr.readline() == "encoding 48 training images\n"
    assert process.stderr.readline().startswith("step 1/100000  loss ")
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = command_line.finish(process)
    assert (code, stdout) == (143, "")
    saved = int(re.search(r"saved at step (\d+); the same command continues", stderr)[1])
    again = _start(*args)
    again.stderr.readline()
    assert again.stderr.readline().startswith(f"step {saved + 1}/100000")
    again.kill()
    again.communicate()


def test_the_command_prints_its_result_and_mistakes_in_one_line(run, tmp_path):
    workdir_flag = f"--workdir={run}"
    cases = {
        "ok": ([workdir_flag, "--sampler=gaussian"], ""),
        "field": (
            [workdir_flag, "--sampler=flow", "--config.flow.num_stepz=3"],
            "error: --config.flow.num_stepz: there is no such field; did you mean flow.num_steps",
        ),
        "workdir": ([f"--workdir={tmp_path}/no", "--sampler=flow"], "is not the workdir of a run"),
        "sampler": ([workdir_flag, "--sampler=flaw"], "--sampler=flaw must be one of"),
    }
    processes = {name: _start(*args) for name, (args, _) in cases.items()}
    for name, process in processes.items():
        code, stdout, stderr = command_line.finish(process)
        if name == "ok":
            assert (code, json.loads(stdout)["sampler"]) == (0, "gaussian"), stderr
            continue
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), (name, stderr)
        assert cases[name][1] in stderr
