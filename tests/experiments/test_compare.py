"""The comparison: its statistics, its tables, and a whole small one."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from experiments import study
from experiments.compare import __main__ as command
from experiments.compare import curves, page, plan, summary
from svae_jax import command_line
from svae_jax import config as configs
from svae_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def evaluation(elbo, swd):
    estimate = {"value": elbo, "standard_error": 1.0}
    return {
        "bounds": {"elbo": estimate, "kl": estimate},
        "floors": {"same latent": {"components": 3, "elbo": {"value": 900.5}}},
        "reconstruction": {"mse": {"value": 0.1, "standard_error": 0.0}},
        "latents": {"active_units": 7},
        "parameters": {"encoder": 10, "decoder": 20, "prior": 5},
        "samples": {
            "training images": {
                "pixels": {"figures": {"swd_mean": {"value": 0.01, "standard_error": None}}}
            },
            "flow": {
                "pixels": {"figures": {"swd_mean": {"value": swd, "standard_error": 0.0}}},
                "bounds": {"elbo": estimate, "elbo_iw": estimate},
            },
        },
    }


def test_the_figures_of_a_run():
    found = summary.figures_of_run({"images_per_second": 5.0}, evaluation(1.5, None))
    assert found == {
        "ELBO, nats": 1.5,
        "KL, nats": 1.5,
        "MSE": 0.1,
        "PCA, same latent": 900.5,
        "active units": 7,
        "ELBO, nats, flow": 1.5,
        "swd_mean, training images": 0.01,
        "parameters, encoder": 10,
        "parameters, decoder": 20,
        "parameters, prior": 5,
        "images/s": 5,
    }


@pytest.mark.parametrize(("cores", "words"), [(1, "1 CPU core"), (3, "3 CPU cores")])
def test_cpu_cores_are_those_that_the_process_may_use(cores, words, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(cores)}, raising=False)
    assert study.device({"platform": "cpu"}) == words


def test_mean_and_standard_deviation_over_seeds():
    runs = [{"a": 1.0}, {"a": 2.0}, {"a": 4.0, "b": 1.0}]
    found = summary.over_seeds(runs)
    assert found["a"]["mean"] == pytest.approx(7 / 3)
    assert found["a"]["sd"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert found["b"] == {"mean": 1, "sd": None, "n": 1}


def test_the_interval_of_paired_differences_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 4))
    found = summary.paired(
        {seed: {"x": value} for seed, value in enumerate([*ours, 9.0])},  # one seed more
        {seed: {"x": value} for seed, value in enumerate(theirs)},
    )["x"]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found["n"] == 4
    assert found["mean"] - found["half_width"] == pytest.approx(low)
    assert found["mean"] + found["half_width"] == pytest.approx(high)


def test_the_best_learning_rate_of_each_model():
    runs = plan.search_runs(
        plan.QUICK._replace(models=("vector", "mvn"), learning_rates=(1.0, 2.0))
    )
    elbos = dict(zip(runs, [3.0, 5.0, None, -7.0], strict=True))
    assert plan.best_rates(elbos) == {("vector", "elbo"): 2.0, ("mvn", "elbo"): 2.0}
    with pytest.raises(UserError, match="all runs of mvn"):
        plan.best_rates(elbos | {runs[3]: None})


def test_each_seed_is_a_whole_table():
    setting = plan.QUICK._replace(models=("vector", "mvn"), seeds=2)
    rates = {("mvn", "elbo"): 0.5, ("vector", "elbo"): 0.1}
    runs = list(plan.final_runs(setting, rates))
    assert [(r.seed, r.model, r.learning_rate) for r in runs] == [
        (0, "vector", 0.1), (0, "mvn", 0.5), (1, "vector", 0.1), (1, "mvn", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("file", ["shapes", "cifar10", "celeba"])
def test_every_run_of_the_full_plan_is_sound(file):
    runs = plan.search_runs(plan.FULL._replace(learning_rates=(1e-3,)))
    names = {
        scaling: [r.model for r in runs if r.scaling == scaling] for _, scaling in _pairs(runs)
    }
    assert names["elbo"] == list(plan.FULL.models)
    assert names["released_code"][-2:] == ["plain_vector", "plain"]
    for run in runs:
        config, _ = command_line.load_config(f"configs/{file}.py:{run.model}")
        config.update_from_flattened_dict(run.overrides)
        configs.check(config)
    rates = command._given_rates(f"configs/{file}.py", plan.FULL._replace(learning_rates=()), {})
    assert rates.keys() == _pairs(runs)
    seeds = plan.final_runs(plan.FULL._replace(seeds=1), rates)
    assert [(run.model, run.scaling) for run in seeds] == [(r.model, r.scaling) for r in runs]


def _pairs(runs):
    return {(run.model, run.scaling) for run in runs}


def test_an_evaluation_of_an_older_version_is_made_again():
    settings = {"num_samples": 5}
    samples = {"prior": {"bounds": {}}}
    found = {"step": 3, "settings": settings, "samples": samples, "floors": {}}
    assert command._is_current(found, settings, 3, ["prior"])
    assert not command._is_current(found | {"samples": {"prior": {}}}, settings, 3, ["prior"])
    del found["floors"]
    assert not command._is_current(found, settings, 3, ["prior"])


def test_without_a_search_each_model_has_its_own_or_the_given_learning_rate(tmp_path):
    path = tmp_path / "rates.py"
    path.write_text(
        "from configs import shapes\n\n\n"
        "def get_config(arg):\n"
        "    config = shapes.get_config(arg)\n"
        "    config.optimizer.learning_rate = 0.5 if arg == 'mvn' else 0.25\n"
        "    return config\n"
    )
    setting = plan.QUICK._replace(models=("vector", "mvn"))
    own = command._given_rates(str(path), setting, {})
    assert own == {("vector", "elbo"): 0.25, ("mvn", "elbo"): 0.5}
    single = setting._replace(learning_rates=(0.1,))
    assert set(command._given_rates(str(path), single, {}).values()) == {0.1}


def test_learning_rates_that_were_given_are_told():
    text = page.render({**comparison(), "search": []})
    assert "which were given: vector 0.001, mvn 0.001." in text


def test_the_search_holds_a_tenth_of_the_training_split_back():
    assert plan.search_split("train") == {
        "dataset.split": "train[:90%]",
        "dataset.eval_split": "train[90%:]",
    }
    with pytest.raises(UserError, match="whole split"):
        plan.search_split("train[:100]")


def comparison():
    runs = [
        {
            "model": model,
            "scaling": "elbo",
            "seed": seed,
            "learning_rate": 0.001,
            "latent": summary.latent(
                {"name": model, "height": 3, "width": 3, "maps": 5, "rank": 1}
            ),
            "workdir": f"{model}{seed}",
            "figures": summary.figures_of_run(
                {"images_per_second": 100.0}, evaluation(elbo + 10 * seed, 0.25 + 0.01 * seed)
            ),
        }
        for model, elbo in (("vector", 1000.0), ("mvn", 1101.0))
        for seed in (0, 1)
    ]
    search = [
        {"model": "mvn", "scaling": "elbo", "learning_rate": rate, "elbo": elbo}
        for rate, elbo in ((0.001, 12.0), (0.003, None))
    ]
    settings = {
        "samplers": ["prior", "flow"], "search_split": "train[90%:]", "search_steps": 300,
        "importance_samples": 5,
        "num_samples": 500, "split": "test", "num_steps": 600, "batch_size": 100,
        "dataset": "shapes", "device": "2 CPU cores", "command": "python -m x",
    }  # fmt: skip
    return {"settings": settings, "runs": runs, "search": search}


def test_the_tables_say_what_the_runs_say():
    text = page.render(comparison())
    assert "1,005.0 ± 7.1" in text  # of 1,000 and 1,010
    assert "+101" in text  # mvn, paired
    assert re.search(r"ELBO, nats +\| KL, nats +\| swd_mean, flow +\|", text)
    assert "0.2550 ± 0.0071" in text
    assert "**12.0**" in text
    assert re.search(r"model +\| seeds +\| ELBO, nats +\| PCA, same latent +\|", text)
    assert text.count("900.5") == 2
    assert "after 300 training steps on `train[90%:]`" in text
    assert "failed" in text
    assert "| mvn, 3x3x5 " in text
    assert not re.search(r"\| prior ", text)  # its parameters are no figure of its samples
    assert text.count("training images") == 1  # they are the same for all runs
    assert re.search(r"\| +\| training images \| 0.01", text)


def test_a_curve_has_epochs_and_the_minutes_of_training(tmp_path):
    rows = [
        {"step": 50, "images_per_second": 100.0},  # 50 seconds
        {"step": 100, "images_per_second": 50.0},  # 100 seconds
        {"step": 100, "eval/elbo": 7.0},
        {"step": 150, "images_per_second": 500.0},  # 10 seconds
        {"step": 150, "eval/elbo": 8.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "data.json").write_text(json.dumps({"train": {"num_images": 5000}}))
    first, last = curves.of_run(tmp_path, batch_size=100)
    assert first == {"step": 100, "epochs": 2.0, "minutes": 2.5, "elbo": 7.0}
    assert last == {"step": 150, "epochs": 3.0, "minutes": pytest.approx(160 / 60), "elbo": 8.0}


def test_the_curves_are_of_the_first_seed_and_have_the_floor_of_each_model():
    point = {"step": 1, "epochs": 1.0, "minutes": 2.0, "elbo": 3.0}
    runs = [run | {"curve": [point]} for run in comparison()["runs"]]
    runs[0]["figures"]["PCA, as many latents"] = 12.0  # it has "same latent" too, 900.5
    for axis in curves.draw(runs).axes:
        names = [line.get_label() for line in axis.get_lines() if line.get_linestyle() == "-"]
        assert names == ["vector", "mvn"]
        levels = [line.get_ydata() for line in axis.get_lines() if line.get_linestyle() == "--"]
        assert levels == [[12.0, 12.0], [900.5, 900.5]]


def test_a_latent_in_words():
    latent = {"name": "lowrank_full", "height": 2, "width": 4, "maps": 7, "rank": 2}
    assert summary.latent(latent) == "lowrank_full, rank 2, 2x4x7"


@pytest.mark.slow
def test_a_small_comparison_from_nothing_and_once_more(tmp_path):
    """Two models with one seed; the second call finds all done and writes the same."""
    argv = [
        sys.executable, "-m", "experiments.compare", "--config=configs/shapes.py",
        f"--workdir={tmp_path}", "--quick", "--engine=local", "--models=vector lowrank",
        "--learning_rates=", "--seeds=1", "--samplers=gaussian,flow", "--flow_steps=2",
        "--importance_samples=1", "--num_samples=20", "--config.num_steps=2",
        "--config.batch_size=10", "--config.dataset.split=train[:100]",
        "--config.dataset.eval_split=test[:40]",
    ]  # fmt: skip
    subprocess.run(argv, cwd=ROOT, check=True, timeout=900)
    content = json.loads((tmp_path / "comparison.json").read_text())
    figures = {run["model"]: run["figures"] for run in content["runs"]}
    for model in ("vector", "lowrank"):
        (workdir,) = (tmp_path / "runs").glob(f"{model}*")
        result = json.loads((workdir / "result.json").read_text())
        assert figures[model]["ELBO, nats"] == pytest.approx(result["metrics"]["eval/elbo"])
        assert {f"swd_mean, {s}" for s in ("prior", "gaussian", "flow")} < figures[model].keys()
    for name in ("comparison", "curves"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 10
    table = (tmp_path / "comparison.md").read_text()
    assert table == page.render(content)
    evaluations = sorted((tmp_path / "runs").glob("*/evaluation.json"))
    written = [path.stat().st_mtime_ns for path in evaluations]
    subprocess.run(argv, cwd=ROOT, check=True, timeout=900)
    assert json.loads((tmp_path / "comparison.json").read_text()) == content
    assert [path.stat().st_mtime_ns for path in evaluations] == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "scaling": (["--scalings=elbow"], "--scalings=elbow must be among elbo, released_code"),
        "sampler": (["--samplers=prior"], "--samplers=prior must be among gaussian, mixture, flow"),
        "seeds": (["--seeds=0"], "--seeds=0: 0 is not a positive integer"),
        "model": (["--models=vektor"], "best_samples (--models says what is compared)"),
        "field": (["--config.sed=1"], "--config.sed: there is no such field"),
        "set by the comparison": (["--config.seed=1"], "--config.seed=1: the sweep sets seed"),
        "split": (
            ["--learning_rates=0.1,0.2", "--config.dataset.split=train[:9]"],
            "must be a whole split",
        ),
    }.values(),
    ids=str,
)
def test_mistakes_are_told_before_anything_runs(arguments, message, tmp_path):
    argv = ["--config=configs/shapes.py", f"--workdir={tmp_path}", "--quick", "--engine=local"]
    with pytest.raises(UserError, match=re.escape(message)):
        command.main([*argv, *arguments])
    assert not list(tmp_path.rglob("metrics.jsonl"))
