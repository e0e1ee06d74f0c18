"""The same network and training step in PyTorch, as PyTorch users write them.

Where SAME padding is not symmetrical, TensorFlow and JAX pad more on the right and PyTorch's own
layers more on the left. Rather than with extra padding and cropping, which would cost PyTorch time,
the network is written with PyTorch's layers: with mirrored parameters it computes the mirror image
of everything (`translated`), at the same cost.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import torch
from jaxtyping import Float, PyTree, UInt8
from torch import Tensor, nn

from experiments.benchmark.stopwatch import Candidate
from svae_jax import config as configs
from svae_jax import latents
from svae_jax.errors import UserError
from svae_jax.model import SpatialVAE, convolutions, networks
from svae_jax.model.objective import MIN_SIGMA

Images = UInt8[np.ndarray, "n h w c"]

_POSTERIORS = ("vector", "naive", "mvn", "lowrank")
_ACTIVATIONS = {
    "elu": nn.ELU,
    "gelu": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
_MIRRORED_AXES = {"mean": (0, 1), "log_variance": (0, 1)}  # of the others: the first alone


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse what is not written in PyTorch here.

    Raises:
        UserError: naming the field.
    """
    if config.latent.name not in _POSTERIORS:
        raise UserError(
            f"latent.name={config.latent.name!r}: PyTorch is compared for "
            f"{', '.join(_POSTERIORS)}; leave it out with --against=plain"
        )
    default, free = configs.base(), ("optimizer.learning_rate", "optimizer.max_bad_steps")
    for section in ("objective", "optimizer"):
        for field, value in config[section].items():
            if f"{section}.{field}" not in free and value != default[section][field]:
                raise UserError(
                    f"{section}.{field}={value!r}: PyTorch is compared for the default alone, "
                    f"{default[section][field]!r}; leave it out with --against=plain"
                )


def device() -> torch.device:
    """The GPU where there is one; on the CPU, all its cores are put to use."""
    torch.set_num_threads(os.cpu_count() or 1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products, as JAX does by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


class Network(nn.Module):
    """Encoder, posterior and decoder; images and latents are channels last, [b, h, w, c]."""

    def __init__(self, model: SpatialVAE, image_shape: tuple[int, int, int]):
        """Build the layers of `model`, with PyTorch's own initial parameters."""
        super().__init__()
        self.posterior, self.style = model.posterior, model.decoder.style
        size, _, channels = image_shape
        encoder = []
        for layer in model.encoder.layers:
            convolution = _convolution(layer, channels, size)
            encoder.append(
                _block(convolution, layer, model.encoder.style, unused=_unused(layer, size))
            )
            channels, size = layer.features, _size(layer, size)
        self.encoder = nn.ModuleList(encoder)
        self.dense = nn.Linear(size**2 * channels, model.posterior.num_params)
        channels = model.posterior.maps
        decoder = []
        for layer in model.decoder.layers[:-1]:
            decoder.append(_block(_transposed(layer, channels), layer, model.decoder.style))
            channels = layer.features
        self.decoder = nn.ModuleList(decoder)
        self.last = _transposed(model.decoder.layers[-1], channels, bias=True)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to the posteriors' numbers, [b, p]."""
        x = self._blocks(self.encoder, images.permute(0, 3, 1, 2))
        return self.dense(x.float().permute(0, 2, 3, 1).flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        """Latent maps to the means of the pixels."""
        x = self._blocks(self.decoder, z.permute(0, 3, 1, 2))
        return self.last(x.float()).tanh().permute(0, 2, 3, 1)

    def losses(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, reconstruction and KL of uint8 images, in nats an image."""
        images = (pixels.float() - 127.5) / 127.5
        mean, log_variance, kl = posterior(self.posterior, self.encode(images))
        noise = torch.randn_like(mean) if noise is None else noise
        means = self.decode(mean + (0.5 * log_variance).exp() * noise)
        num_dims = images[0].numel()
        error = (images - means).square().sum((1, 2, 3)).mean()
        variance = (error / num_dims).detach().clamp(min=MIN_SIGMA**2)
        reconstruction = -0.5 * (
            error / variance + num_dims * (variance.log() + math.log(2 * math.pi))
        )
        return kl.mean() - reconstruction, reconstruction, kl.mean()

    def _blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """All convolutions but the last, in the style's precision."""
        low = self.style.dtype == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            for block in blocks:
                x = block(x)
        return x


def _block(
    convolution: nn.Module, layer: networks.Layer, style: networks.Style, unused: int = 0
) -> nn.Sequential:
    features = layer.features
    parts: dict[str, nn.Module] = {"convolution": convolution}
    if unused:
        parts = {"crop": nn.ZeroPad2d((-unused, 0, -unused, 0)), **parts}
    if style.norm == "batch":
        parts["norm"] = nn.BatchNorm2d(features, eps=1e-5, momentum=0.1)
    elif style.norm == "group":
        parts["norm"] = nn.GroupNorm(networks.num_groups(features), features, eps=1e-6)
    else:
        convolution.register_parameter("bias", nn.Parameter(torch.zeros(features)))
    parts["activation"] = _ACTIVATIONS[style.activation]()
    return nn.Sequential(collections.OrderedDict(parts))


def _unused(layer: networks.Layer, size: int) -> int:
    """Pixels that VALID leaves unused: the last ones, and so, mirrored, the first."""
    return (size - layer.kernel) % layer.strides[0] if layer.paddings[0] == "VALID" else 0


def _size(layer: networks.Layer, size: int) -> int:
    return convolutions.output_size(size, layer.kernel, layer.strides[0], layer.paddings[0])


def _convolution(layer: networks.Layer, channels: int, size: int) -> nn.Conv2d:
    kernel, stride = layer.kernel, layer.strides[0]
    padding = 0
    if layer.paddings[0] == "SAME":
        padding = -(-max((_size(layer, size) - 1) * stride + kernel - size, 0) // 2)
    if (size + 2 * padding - kernel) // stride + 1 != _size(layer, size):
        raise UserError(
            f"model.encoder: PyTorch has no padding for a {kernel}x{kernel} layer of stride "
            f"{stride} on {size} pixels; leave it out with --against=plain"
        )
    return nn.Conv2d(channels, layer.features, kernel, stride, padding, bias=False)


def _transposed(layer: networks.Layer, channels: int, bias: bool = False) -> nn.ConvTranspose2d:
    kernel, stride = layer.kernel, layer.strides[0]
    if kernel < max(stride, 2) or (stride == 1 and kernel % 2 == 0):
        raise UserError(
            f"model.decoder: PyTorch has no padding for a {kernel}x{kernel} layer of stride "
            f"{stride}; leave it out with --against=plain"
        )
    if layer.paddings[0] == "VALID":
        padding, extra = 0, 0
    else:
        total = kernel + stride - 2
        padding, extra = kernel - 1 - total // 2, total % 2
    return nn.ConvTranspose2d(
        channels, layer.features, kernel, stride, padding, output_padding=extra, bias=bias
    )


def posterior(family: latents.Posterior, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and log-variance of every entry, [b, h, w, n], and the KL, [b]."""
    sizes = [math.prod(shape) for shape in family.shapes.values()]
    parts = {
        name: part.unflatten(1, shape)
        for (name, shape), part in zip(family.shapes.items(), flat.split(sizes, 1), strict=True)
    }
    if "mean" in parts:
        mean = parts["mean"]
    else:
        mean = (parts["mu"][:, :, None] * parts["nu"][:, None]).sum(-2)
    if "log_variance" in parts:
        log_variance = parts["log_variance"]
        trace = log_variance.exp().sum((1, 2))
    else:
        rows, cols = parts["row_log_variance"], parts["col_log_variance"]
        log_variance = rows[:, :, None] + cols[:, None]
        trace = rows.exp().sum(1) * cols.exp().sum(1)
    of_map = trace + (mean.square() - 1 - log_variance).sum((1, 2))
    return mean, log_variance, 0.5 * of_map.sum(1)


def translated(model: SpatialVAE, params: PyTree, stats: PyTree) -> dict[str, np.ndarray]:
    """Our parameters (or their gradients) and batch statistics, mirrored, by PyTorch's names."""
    named = {}
    for side, axes in (("encoder", (3, 2, 0, 1)), ("decoder", (2, 3, 0, 1))):
        for i in range(len(params[side]) - 1):
            block = params[side][f"Block_{i}"]
            kernel = np.asarray(block["Convolution_0"]["kernel"])
            # PyTorch, too, mirrors a transposed convolution's kernel: both together change nothing.
            mirrored = np.flip(kernel, (0, 1)) if side == "encoder" else kernel
            named[f"{side}.{i}.convolution.weight"] = mirrored.transpose(axes)
            if "bias" in block["Convolution_0"]:
                named[f"{side}.{i}.convolution.bias"] = block["Convolution_0"]["bias"]
            for norm in ("BatchNorm_0", "GroupNorm_0"):
                if norm in block:
                    named[f"{side}.{i}.norm.weight"] = block[norm]["scale"]
                    named[f"{side}.{i}.norm.bias"] = block[norm]["bias"]
            if side in stats:
                tracked = stats[side][f"Block_{i}"]["BatchNorm_0"]
                named[f"{side}.{i}.norm.running_mean"] = tracked["mean"]
                named[f"{side}.{i}.norm.running_var"] = tracked["var"]
    last, dense = params["decoder"]["Convolution_0"], params["encoder"]["Dense_0"]
    named["last.weight"] = np.asarray(last["kernel"]).transpose(2, 3, 0, 1)
    named["last.bias"] = last["bias"]
    features = model.encoder.layers[-1].features
    kernel, columns = np.asarray(dense["kernel"]), mirrored_columns(model.posterior)
    size = math.isqrt(len(kernel) // features)
    kernel = np.flip(kernel.reshape(size, size, features, -1), (0, 1)).reshape(kernel.shape)
    named["dense.weight"] = kernel[:, columns].T
    named["dense.bias"] = np.asarray(dense["bias"])[columns]
    return {name: np.array(value) for name, value in named.items()}


def mirrored_columns(posterior: latents.Posterior) -> np.ndarray:
    """Which of our posterior's numbers stands where, when the maps are mirrored."""
    columns, start = [], 0
    for name, shape in posterior.shapes.items():
        numbers = start + np.arange(math.prod(shape)).reshape(shape)
        columns.append(np.flip(numbers, _MIRRORED_AXES.get(name, (0,))).ravel())
        start += numbers.size
    return np.concatenate(columns)


def make(model: SpatialVAE, image_shape: tuple[int, int, int], variables: PyTree) -> Network:
    """The network, channels last, with a copy of our variables.

    Raises:
        UserError: a layer for which PyTorch has no padding.
    """
    for layer in (*model.encoder.layers, *model.decoder.layers):
        if len(set(layer.paddings)) > 1 or len(set(layer.strides)) > 1:
            raise UserError("latent.height and latent.width must be equal, to compare")
    network = Network(model, image_shape)
    ours = jax.device_get(variables)
    values = translated(model, ours["params"], ours["batch_stats"])
    state = {name: torch.from_numpy(value) for name, value in values.items()}
    missing, unknown = network.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith("num_batches_tracked")] + unknown
    assert not left, left
    return network.to(device(), memory_format=torch.channels_last)


def numbers(
    network: Network, pixels: Images, noise: np.ndarray, z: np.ndarray
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Losses of a batch and images generated from z; the gradients, by PyTorch's names.

    Args:
        network: as made; its running statistics change.
        pixels: a batch.
        noise: white noise of the posterior's samples, [b, h, w, n].
        z: latents to generate from.
    """

    def mirrored(array: Float[np.ndarray, "b h w c"]) -> Tensor:
        return torch.from_numpy(np.flip(array, (1, 2)).copy()).to(device())

    with torch.inference_mode():
        images = np.flip(network.eval().decode(mirrored(z)).cpu().numpy(), (1, 2))
    losses = network.train().losses(mirrored(pixels), mirrored(noise))
    losses[0].backward()
    named = dict(zip(("loss", "reconstruction", "kl"), (x.item() for x in losses), strict=True))
    gradients = {
        name: parameter.grad.cpu().numpy() for name, parameter in network.named_parameters()
    }
    return named | {"generated images": images}, gradients


def training(
    network: Network, images: Images, batch_size: int, learning_rate: float, compiled: bool
) -> Candidate:
    """Updates with batches of images that are on the device."""
    network.train()
    on_device = torch.from_numpy(images).to(device())
    losses = _compiled(network.losses) if compiled else network.losses
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, fused=True)
    total = torch.zeros((), device=device())
    order: Sequence[Tensor] = []

    def run(num_steps: int) -> None:
        nonlocal order
        for _ in range(num_steps):
            if not order:
                shuffled = torch.randperm(len(images), device=device())
                order = list(shuffled.split(batch_size)[: len(images) // batch_size])
            loss = losses(on_device[order.pop()])[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total.add_(loss.detach())
        _wait()

    return run


def generation(network: Network, batch_size: int, compiled: bool) -> Candidate:
    """Batches of images generated from the prior."""
    network.eval()
    decode = _compiled(network.decode) if compiled else network.decode
    posterior = network.posterior
    shape = (batch_size, posterior.height, posterior.width, posterior.maps)

    def run(num_batches: int) -> None:
        with torch.inference_mode():
            for _ in range(num_batches):
                decode(torch.randn(shape, device=device()))
        _wait()

    return run


def _compiled(function: Callable) -> Callable:
    # On a GPU the launches of so small a network's kernels cost more than their work.
    return torch.compile(function, mode="reduce-overhead" if torch.cuda.is_available() else None)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
