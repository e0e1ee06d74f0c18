"""`page`: the report as a browser reads it, and what it refuses."""

import base64
import html
import html.parser
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import svae_jax
from svae_jax.analysis import fitted
from svae_jax.analysis.report import content, page
from svae_jax.errors import UserError

VOID = {"img", "meta"}
CHARTS = 4


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text; refuses elements that are not closed in order."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def _evaluation(run):
    """What `evaluate` writes, as far as the page shows it."""
    one = {"value": 1.25, "standard_error": 0.5}
    names = ("elbo", "bits_per_dim", "bits_per_dim_iw", "kl")
    distances = {"settings": {}, "num_samples": 9, "num_reference": 8, "reference": "test"}
    prior = {"pixels": distances | {"figures": {"swd_8": one}}, "memorisation": {}}
    return {
        **fitted.model_identity(run),
        "config": run.config.to_dict(),
        "split": "test",
        "num_images": 20,
        "settings": {"importance_samples": 7},
        "bounds": dict.fromkeys(names, one) | {"sigma": 0.3125},
        "reconstruction": dict.fromkeys(("mse", "psnr", "ssim"), one),
        "latents": {"active_units": 31},
        "samples": {"prior": prior},
    }


@pytest.fixture(scope="module")
def runs(trained_run, tmp_path_factory):
    """A run with an evaluation, and a copy whose name is markup and whose Gaussian is gone."""
    root = tmp_path_factory.mktemp("report")
    first = shutil.copytree(trained_run, root / "first")
    (first / "evaluation.json").write_text(json.dumps(_evaluation(svae_jax.load(first))))
    second = shutil.copytree(trained_run, root / '<script>"&')
    shutil.rmtree(second / "samplers")
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # as in a run that is being written to
    return first, second


@pytest.fixture(scope="module")
def source(runs):
    out = runs[0].parent / "new" / "report.html"
    assert page.write(runs, out) == out
    return out.read_text()


@pytest.fixture(scope="module")
def parsed(source):
    return Page(source)


def test_it_loads_nothing_and_runs_nothing(source, parsed):
    (policy,) = (meta["content"] for meta in parsed.of("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not parsed.of("script", "link", "iframe", "object", "embed", "base", "form", "a", "use")
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
    visible = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", source)
    assert not re.search(r"://|url\(|@import|src=\"(?!\")", visible)
    assert len(source) < 3e6


def test_every_picture_is_inside_and_has_a_text(parsed):
    images = parsed.of("img")
    # Two runs of seven pictures, of which edits are two; the first run has a Gaussian too.
    assert len(images) == CHARTS + 2 * (1 + 1 + 2 + 1 + 1 + 1 + 1) + 1
    for image in images:
        assert len(image["alt"]) > 20
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format == "PNG"
            assert any(low < high for low, high in picture.getextrema()[:3])


def test_it_is_ordered_and_named(parsed):
    assert parsed.of("html") == [{"lang": "en"}]
    headings = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert {cell["scope"] for cell in parsed.of("th")} == {"row", "col"}
    names = {meta["name"]: meta["content"] for meta in parsed.of("meta") if "name" in meta}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert names["color-scheme"] == "light dark"


def test_it_says_what_the_runs_are(runs, parsed):
    text = parsed.text
    assert '<script>"&' in text  # escaped in the source: the parser found no such element
    metrics = json.loads((runs[0] / "result.json").read_text())["metrics"]
    assert f"{metrics['eval/elbo']:,.1f}" in text
    assert "3 x 3 x 4 = 36" in text
    assert "not fitted" in text
    assert "dataset.height" in text
    for told in ("sigma 0.3125", "bits/dim, K=7", "1.25 ± 0.50", "swd_8", "9 images against 8"):
        assert told in text
    assert "do not compare" not in text


def test_runs_of_different_images_stand_side_by_side_with_a_warning(runs, tmp_path):
    other = shutil.copytree(runs[1], tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    fields["dataset"]["eval_split"] = "train[:9]"
    (other / "config.json").write_text(json.dumps(fields))
    (other / "data.json").unlink()  # which says that these are not the images of the run
    text = Page(page.write([runs[0], other], tmp_path / "a.html").read_text()).text
    assert re.search(
        r"different images: first \(\S+ test, 8 x 8\), other \(\S+ train\[:9\], 8", text
    )
    assert "do not compare" in text


def test_what_is_of_another_checkpoint_is_left_out_and_named(runs, tmp_path):
    older = shutil.copytree(runs[0], tmp_path / "older")
    shutil.rmtree(older / "checkpoints" / "4")
    parsed = Page(page.write([svae_jax.load(older)], tmp_path / "a.html").read_text())
    assert "fitted to another checkpoint (step 4)" in parsed.text
    assert "of another checkpoint: run svae_jax.evaluate again" in parsed.text
    assert "Evaluation" not in parsed.text
    assert len(parsed.of("img")) == CHARTS + 8


def _content(label, data_dir):
    """A run without pictures, with metrics that lack one of the charts."""
    row = {"step": 1, "eval/elbo": -3.0, "train/loss": 3.0, "train/reconstruction": -2.0}
    pictures = {key: {} for key, _, _ in page._SECTIONS}
    config = {"dataset.data_dir": data_dir, "seed": 0}
    return content.Content(label, "folder test, 8 x 8", {}, config, [row], pictures, None)


def test_configurations_may_differ_in_case_alone():
    same, other = _content("a", "/data/Cats"), _content("b", "/data/cats")
    differ = "Where the configurations differ"
    parsed = Page(page.html([same, other]))
    regions = [attributes["aria-label"] for attributes in parsed.of("div") if "role" in attributes]
    assert regions == ["facts", "differences", "configuration"]
    assert parsed.text.count("/data/Cats") == 2
    assert differ in parsed.text
    assert differ not in Page(page.html([same, same])).text


def test_a_metric_that_no_run_has_gets_no_chart():
    assert len(Page(page.html([_content("a", "/data")])).of("img")) == CHARTS - 1


def test_labels_differ():
    assert page._labels([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert page._labels([Path("runs/a"), Path("old/a")]) == ["runs/a", "old/a"]
    assert page._labels([Path("runs/a"), Path("runs/a")]) == ["runs/a (1)", "runs/a (2)"]


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((1, 1), {"the whole latent": 1}),
        ((3, 1), {"one cell": 1, "the lower half": 2}),
        ((2, 5), {"one cell": 1, "the right half": 6}),
    ],
)
def test_a_half_of_a_latent_is_not_the_whole(shape, names):
    masks = content._edited_cells(*shape)
    assert {name: where.sum() for name, where in masks.items()} == names


MISTAKES = {
    "exists": ({"out": "there.html"}, r"--out=.*there\.html exists; remove it"),
    "no page": ({"out": "report.png"}, r"--out=.*report\.png must end in \.html"),
    "no folder": ({"out": "there.html/a.html"}, r"--out=.*a\.html cannot be written"),
    "no run": ({"run": "nothing"}, "nothing is not the workdir of a run"),
    "no checkpoint": ({"run": "empty"}, "no checkpoint in .*empty"),
}


@pytest.mark.parametrize(("changed", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line_and_write_nothing(runs, tmp_path, changed, message):
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    shutil.copy(runs[0] / "config.json", tmp_path / "empty")
    given = {"run": runs[0], "out": "new.html"} | changed
    with pytest.raises(UserError, match=message) as error:
        page.write([runs[0], tmp_path / given["run"]], tmp_path / given["out"])
    assert "\n" not in str(error.value)
    assert (tmp_path / "there.html").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.html", "empty"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_before_the_work(runs, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"--out=.* cannot be written: Permission denied"):
        page.write([runs[0]], tmp_path / "a.html")


def test_the_command_writes_and_refuses(runs, tmp_path):
    out = tmp_path / "report.html"
    command = [sys.executable, "-m", "svae_jax.explore", f"--workdir={runs[0]}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert Page(out.read_text()).of("img")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == f"error: --out={out} exists; remove it, or choose another --out\n"
