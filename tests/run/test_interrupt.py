"""Signals, locks and numbers that are not finite, as a user meets them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from svae_jax import config as configs
from svae_jax.errors import UserError
from svae_jax.run import checkpoint, interrupt, workdir
from svae_jax.training import loop, step
from tests import command_line


@pytest.fixture
def start_run(start, tiny_config, tmp_path):
    """Starts a long run in a process of its own, on the command line."""
    tiny_config.update(num_steps=100_000, log_every=1, eval_every=100_000, sample_every=100_000)
    tiny_config.checkpoint.every = 100_000
    return lambda: start(*command_line.arguments(tiny_config, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _terminal_is_heard():
    """Tests that were started by `nohup` would hand its deafness to their runs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_signal_saves_and_the_same_command_goes_on(start_run, tmp_path):
    saved = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)):
        process = start_run()
        assert process.stderr.readline().startswith(f"step {saved + 1}/")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        last = stderr.splitlines()[-1]
        now = int(re.search(r"saved at step (\d+); the same command continues", last)[1])
        assert signal.Signals(number).name in last
        assert checkpoint.load(tmp_path / "run" / "checkpoints").step == now > saved
        assert not (tmp_path / "run" / "result.json").exists()
        saved = now


def test_a_terminal_that_closes_may_say_so_twice():
    with interrupt.listening() as request:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert request.signal_number == signal.SIGHUP
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_run_after_nohup_does_not_hear_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.listening() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signal_number is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once(tiny_config, tmp_path):
    """Saving takes for ever here; the second signal does not wait for it."""
    script = f"""
import json, sys, time
from svae_jax import config, main
from svae_jax.training import loop
from svae_jax.run.checkpoint import Checkpointer
save = Checkpointer.save
def slow(self, step, *args, **kwargs):
    if step > 2:
        print("saving", flush=True)
        time.sleep(600)
    save(self, step, *args, **kwargs)
Checkpointer.save = slow
loop.train(config.from_dict(json.loads(sys.argv[1])), {str(tmp_path / "run")!r})
"""
    tiny_config.update(num_steps=1000)
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(tiny_config.to_dict())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=command_line.ROOT,
    )  # fmt: skip
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert checkpoint.load(tmp_path / "run" / "checkpoints").step == 2


def test_a_second_run_is_refused_and_told_by_whom(start_run, tiny_config, tmp_path):
    process = start_run()
    assert process.stderr.readline().startswith("step ")
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"is in use by process {process.pid} on "):
        loop.train(tiny_config, tmp_path / "run")
    assert time.monotonic() - started < 10
    process.kill()  # and a killed process leaves no lock behind
    process.communicate()
    with workdir.locked(tmp_path / "run"):
        pass


# Numbers.


@jax.custom_vjp
def _with_gradient_times(x, factor):
    return x


_with_gradient_times.defvjp(
    lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor))
)


def _poison(monkeypatch, bad_steps, value=jnp.nan, where="loss"):
    """Make the loss (or only its gradient) of some steps not finite."""
    from svae_jax.model import objective

    training_loss = objective.training_loss

    def poisoned(objective_, likelihood, at, images, means, *args, **kwargs):
        bad = jnp.any(at == jnp.asarray(bad_steps))
        if where == "gradient":
            means = _with_gradient_times(means, jnp.where(bad, jnp.nan, 1.0))
            return training_loss(objective_, likelihood, at, images, means, *args, **kwargs)
        losses = training_loss(objective_, likelihood, at, images, means, *args, **kwargs)
        change = jnp.where(bad, value, 0.0)
        return losses._replace(
            loss=losses.loss + change, reconstruction=losses.reconstruction + change
        )

    monkeypatch.setattr(objective, "training_loss", poisoned)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tiny_config, tmp_path, monkeypatch, value):
    _poison(monkeypatch, [4], value)  # the fifth step; checkpoints are of 2 and 4
    with pytest.raises(UserError, match="the reconstruction was not finite in step 5; ") as caught:
        loop.train(tiny_config, tmp_path)
    assert "Last good checkpoint: step 4" in str(caught.value)
    loaded = checkpoint.load(tmp_path / "checkpoints")
    assert loaded.step == 4
    leaves = jax.tree.leaves(loaded.state)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_skipping_takes_no_bad_step_and_counts_them(tiny_config, tmp_path, monkeypatch):
    tiny_config.optimizer.max_bad_steps = 2
    _poison(monkeypatch, [2, 3, 5])
    result = loop.train(tiny_config, tmp_path)
    assert np.isfinite(result["metrics"]["eval/elbo"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = {row["step"]: row["train/skipped"] for row in rows if "train/skipped" in row}
    assert skipped == {2: 0, 4: 2, 6: 1, 8: 0}
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses[4] is None  # there was no good step
    assert np.isfinite(losses[6])


def test_one_bad_step_more_than_allowed_ends_the_run(tiny_config, tmp_path, monkeypatch):
    tiny_config.optimizer.max_bad_steps = 2
    _poison(monkeypatch, [3, 4, 5])
    with pytest.raises(UserError, match="not finite in step 6"):
        loop.train(tiny_config, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints").step == 4


def test_a_bad_step_changes_nothing_but_the_count(tiny_config, monkeypatch):
    tiny_config.optimizer.update(max_bad_steps=1, ema_decay=0.9)
    recipe = configs.recipe(tiny_config, 10)
    state = step.init_state(recipe)
    pixels = jax.random.randint(jax.random.key(0), (12, 8, 8, 3), 0, 256).astype(jnp.uint8)
    _poison(monkeypatch, [0, 1])
    update = jax.jit(lambda state: step.train_step(recipe, state, pixels))
    bad, scalars = update(state)
    assert (int(bad.step), int(bad.health.bad_in_a_row), int(bad.health.failed_at)) == (1, 1, -1)
    assert float(scalars["skipped"][0]) == 1
    same = (state.params, state.batch_stats, state.opt_state, state.ema)
    jax.tree.map(
        np.testing.assert_array_equal,
        same, (bad.params, bad.batch_stats, bad.opt_state, bad.ema),
    )  # fmt: skip
    failed, _ = update(bad)
    assert int(failed.health.failed_at) == 1
    # A later good step does not hide the failure, and is not taken.
    later, _ = update(failed)
    assert int(later.health.failed_at) == 1
    jax.tree.map(np.testing.assert_array_equal, later.params, state.params)


def test_a_gradient_that_is_not_finite_is_named(tiny_config, tmp_path, monkeypatch):
    _poison(monkeypatch, [4], where="gradient")
    with pytest.raises(UserError, match="the gradient was not finite in step 5"):
        loop.train(tiny_config, tmp_path)


def test_a_real_divergence_is_caught(tiny_config, tmp_path):
    """Nothing is patched: an absurd learning rate."""
    tiny_config.optimizer.learning_rate = 1e30
    with pytest.raises(UserError, match=r"was not finite in step [12];.*: None"):
        loop.train(tiny_config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_run_that_was_not_given_the_main_thread_still_trains(tiny_config, tmp_path):
    """From a notebook's or a sweep's thread, no handler can be set."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        assert pool.submit(loop.train, tiny_config, tmp_path).result()["step"] == 8
    assert os.listdir(tmp_path / "checkpoints")
