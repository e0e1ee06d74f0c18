"""What the README shows is what works."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

import svae_jax
from experiments.compare import summary
from svae_jax import config as configs
from svae_jax import latents, likelihoods, sampler_config, samplers
from svae_jax.analysis import evaluating, fitting, tables
from svae_jax.analysis.report import page
from svae_jax.data import sources
from svae_jax.errors import UserError
from svae_jax.evaluation.per_image import METRICS
from svae_jax.latents import priors, table
from svae_jax.training import loop

ROOT = Path(__file__).parents[1]
EXTENDING = ROOT / "svae_jax" / "EXTENDING.md"
README = (ROOT / "README.md").read_text() + EXTENDING.read_text()
PAGES = [
    ROOT / "README.md",
    EXTENDING,
    ROOT / "svae_jax" / "HOWTO.md",
    *(ROOT / room / "README.md" for room in ("configs", "svae_jax", "experiments/sweep")),
    ROOT / "experiments" / "results" / "README.md",
]


def _example(word, page=README):
    """The Python block of the README, or of another page, that holds `word`."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = (block for block in blocks if word in block)
    return block


def _run(word):
    names: dict = {"__name__": "example"}
    exec(_example(word), names)  # our own README
    return names


def test_the_library_example_runs_and_says_the_right_shapes():
    names = _run("sample_prior(jax.random.key(2)")
    assert names["z"].shape == (16, 3, 3, 128)
    assert names["kl"].shape == names["log_q"].shape == (16,)
    assert isinstance(names["prior"], jax.Array)


def test_the_table_of_models_is_that_of_the_code():
    table = README.split("## Models")[1].split("The name follows")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == latents.names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_and_files_that_are_shown_exist(page):
    targets = re.findall(r"""\]\(([^)#:]+)\)|src="([^"]+)""", page.read_text())
    for target in map("".join, targets):
        assert (page.parent / target).exists(), target


def test_a_model_that_comes_with_the_package_is_one_call_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = _run('method="decode"')
    assert names["images"].shape == (8, 32, 32, 3)
    a, b, edited = (x.astype(float) for x in (names["a"], names["b"], names["edited"][0]))
    assert np.abs(edited[:, 22:] - b[:, 22:]).mean() < 8  # of 255
    assert np.abs(edited[:, :18] - a[:, :18]).mean() < 8
    assert Path("fill.png").stat().st_size > 0


def test_a_trained_model_is_one_call_away(tiny_config, tmp_path, monkeypatch):
    tiny_config.num_steps = 4
    monkeypatch.chdir(tmp_path)
    loop.train(tiny_config, Path("runs/shapes"))
    fitting.fit("runs/shapes", "gaussian", sampler_config.base())
    names: dict = {}
    exploring = (ROOT / "svae_jax" / "README.md").read_text().replace("test[:500]", "test")
    exploring = exploring.replace("8:24", "2:5")
    exec(_example("run.directions", exploring), names)
    assert names["encoding"].mean.shape == (1, 3, 3, 4)
    assert names["nats"].shape == (1, 3, 3)
    assert names["found"].energy.shape == (3, 3, 8, 8)
    assert names["drawn"].shape == (8, 8, 8, 3)
    assert names["filled"].images.shape == (8, 8, 8, 3)
    assert Path("edit.pdf").stat().st_size > 0
    assert Path("fill.pdf").stat().st_size > 0


def test_the_gallery_is_made_by_its_lines(tiny_config, tmp_path, monkeypatch):
    tiny_config.num_steps = 2
    tiny_config.latent.prior = "autoregressive"
    monkeypatch.chdir(tmp_path)
    loop.train(tiny_config, Path("runs/shapes"))
    example = _example("figures.kl_maps", (ROOT / "svae_jax" / "README.md").read_text()).replace(
        "test[:16]", "test"
    )
    exec(example.replace("12:24, 8:24", "3:6, 2:6"), {})  # our own README
    for name in ("edits", "fill", "locality", "kl_maps", "reconstructions"):
        assert np.asarray(Image.open(f"{name}.png")).std() > 1


@pytest.fixture
def isotropic(monkeypatch):
    """The README's posterior, as a row of the table."""
    row = (table.FreeMean, _run("class Isotropic")["Isotropic"])
    monkeypatch.setitem(table._TABLE, "isotropic", row)
    return latents.make("isotropic", height=2, width=3, maps=2)


def test_a_posterior_of_ones_own_is_a_gaussian(isotropic, x64):
    params = isotropic.unpack(jax.random.normal(jax.random.key(0), (isotropic.num_params,)))
    variance = jnp.exp(params["log_variance"][0, 0])
    for i in range(isotropic.maps):
        mean = np.asarray(isotropic.mean(params))[..., i].ravel()
        covariance = float(variance[i]) * np.eye(6)
        _, log_det = np.linalg.slogdet(covariance)
        expected = 0.5 * (np.trace(covariance) + mean @ mean - 6 - log_det)
        np.testing.assert_allclose(isotropic.kl_per_map(params)[i], expected, rtol=1e-12)
    stddev = isotropic.stddev(params)
    np.testing.assert_allclose(stddev, jnp.broadcast_to(jnp.sqrt(variance), stddev.shape))


def test_a_posterior_of_ones_own_trains_by_its_name(isotropic, tiny_config, tmp_path):
    tiny_config.latent.name = "isotropic"
    tiny_config.num_steps = 2
    assert loop.train(tiny_config, tmp_path / "run")["step"] == 2
    assert svae_jax.load(tmp_path / "run").model.posterior.name == "isotropic"


@pytest.fixture
def smooth(monkeypatch):
    """The README's prior, as a row of the table."""
    names = _run("class Smooth")
    monkeypatch.setitem(priors._TABLE, "smooth", names["Smooth"])
    return latents.make_prior("smooth", height=2, width=3, maps=2)


def test_a_prior_of_ones_own_is_an_autoregression(smooth, x64):
    params = {"mean": jnp.zeros((2, 3, 2)), "correlation": jnp.arctanh(jnp.asarray(0.6))}
    rows, cols = (0.6 ** abs(np.subtract.outer(*[np.arange(n)] * 2)) for n in (2, 3))
    covariance = np.kron(np.kron(rows, cols), np.eye(2))
    z = np.random.default_rng(0).standard_normal((4, 2, 3, 2))
    expected = scipy.stats.multivariate_normal(np.zeros(12), covariance).logpdf(z.reshape(4, 12))
    np.testing.assert_allclose(smooth.log_prob(params, jnp.asarray(z)), expected, rtol=1e-10)


def test_a_prior_of_ones_own_trains_by_its_name(smooth, tiny_config, tmp_path):
    tiny_config.latent.prior = "smooth"
    tiny_config.num_steps = 2
    assert loop.train(tiny_config, tmp_path / "run")["parameters"]["prior"] == 3 * 3 * 4 + 1
    run = svae_jax.load(tmp_path / "run")
    assert run.sample(2).shape == (2, 8, 8, 3)


def test_a_likelihood_of_ones_own_trains_by_its_name(monkeypatch, tiny_config, tmp_path):
    monkeypatch.setitem(likelihoods._TABLE, "student_t", _run("class StudentT")["StudentT"])
    tiny_config.objective.update(likelihood="student_t", sigma="learned")
    tiny_config.num_steps = 2
    metrics = loop.train(tiny_config, tmp_path / "run")["metrics"]
    assert np.isfinite(metrics["eval/bits_per_dim"])


@pytest.mark.usefixtures("small_floors")
@pytest.mark.usefixtures("small_floors")
def test_arrays_of_ones_own_train(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 4096, (n, 16, 16, 2), np.uint16) for n in (120, 20)]
    names: dict = {}
    exec(_example("def train_on").replace("600", "2"), names)  # our own README
    # A smaller model than the example's.
    monkeypatch.setattr(names["command_line"], "load_config", lambda _: (_tiny_cifar10(), {}))
    run, bounds_found = names["train_on"](*images, tmp_path / "run")
    assert np.isfinite(bounds_found["bits_per_dim"]["value"])
    reconstructed = run.reconstruct(run.images("test[:3]"))
    assert (reconstructed.dtype, reconstructed.shape) == (np.uint16, (3, 16, 16, 2))


def _tiny_cifar10():
    config = configs.base()
    config.dataset.update(height=32, width=32, channels=3)
    config.latent.update(name="mvn", height=4, width=4, maps=2)
    config.model.update(encoder="5x5/4/s2", decoder="3x3/4 3x3/4 5x5/4/s2 5x5/image/s2")
    config.optimizer.schedule = "cosine"
    return config


def test_a_network_of_ones_own_trains_and_loads(tiny_config, tmp_path):
    names = _run("class Encoder")
    tiny_config.num_steps = 2
    assert names["train"](tiny_config, tmp_path / "run")["step"] == 2
    posterior = latents.make("mvn", height=3, width=3, maps=16)
    model = names["SpatialVAE"](posterior, names["Encoder"](posterior), names["Decoder"](8, 8))
    with pytest.raises(UserError, match=r"not of the model .*load\(\.\.\., model=\.\.\.\)"):
        svae_jax.load(tmp_path / "run")
    trained = svae_jax.load(tmp_path / "run", model=model)
    z = trained.model.sample_prior(jax.random.key(0), 2)
    assert trained.model.apply(trained.variables, z, method="decode").shape == (2, 8, 8, 3)


def test_a_metric_of_ones_own_is_reported(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "absolute_error", _run("def absolute_error")["row"])
    tiny_config.num_steps = 2
    metrics = loop.train(tiny_config, tmp_path / "run")["metrics"]
    assert 0 < metrics["eval/absolute_error"] < 2 * 8 * 8 * 3
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("eval/absolute_error" in json.loads(row) for row in rows)
    settings = evaluating.Settings(importance_samples=1, num_samples=20)
    evaluation = evaluating.evaluate(tmp_path / "run", settings)
    value = evaluation["bounds"]["absolute_error"]["value"]
    assert value == pytest.approx(metrics["eval/absolute_error"], rel=1e-5)
    assert "absolute error" in tables.runs([evaluation])[0]
    figures = summary.figures_of_run({"images_per_second": 1.0}, evaluation)
    assert figures["absolute error"] == value
    text = page.write([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "absolute error" in text


def test_a_sampler_of_ones_own_is_fitted_drawn_and_evaluated(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(samplers.TABLE, "separate", _run("class Separate")["Separate"])
    tiny_config.num_steps = 2
    loop.train(tiny_config, tmp_path / "run")
    settings = sampler_config.base()
    settings.separate.spread = 0.0
    fitting.fit(tmp_path / "run", "separate", settings)
    run = svae_jax.load(tmp_path / "run")
    mean = run.encode(run.images("train")).mean.mean(axis=0)
    np.testing.assert_allclose(run.sampler("separate")(jax.random.key(0), 1)[0], mean, atol=1e-5)
    wanted = evaluating.Settings(importance_samples=1, num_samples=20)
    assert "separate" in evaluating.evaluate(tmp_path / "run", wanted)["samples"]


def test_a_data_set_of_ones_own_trains(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "waves", _run("class Waves")["Waves"])
    tiny_config.dataset.update(name="waves", split="train[:40]", eval_split="test[:20]")
    tiny_config.dataset.cache_dir = str(tmp_path / "cache")
    tiny_config.num_steps = 2
    assert loop.train(tiny_config, tmp_path / "run")["step"] == 2
