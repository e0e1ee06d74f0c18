"""The same network and training step as PyTorch users write them, with PyTorch's own layers.

Where SAME padding is not symmetrical, JAX pads more on the right and PyTorch's layers more on the
left. So with mirrored parameters (`translated`) the PyTorch network computes the mirror image of
everything, at the same cost. Explicit padding and cropping would make PyTorch slower.
"""

import math
import os
from collections import OrderedDict
from typing import Any

import jax
import numpy as np
import torch
from flax import traverse_util
from jaxtyping import Float, PyTree
from torch import Tensor, nn

from experiments.benchmark import workloads
from experiments.benchmark.stopwatch import Contender
from svae_jax import latents
from svae_jax.model import SpatialVAE, convolutions
from svae_jax.model.layers import Layer
from svae_jax.recipe import Recipe

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Names of parameters and statistics that are not the same in Flax and PyTorch.
_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class Network(nn.Module):
    """Encoder, posterior and decoder; images and latents are channels last, [b, h, w, c]."""

    def __init__(self, model: SpatialVAE, image_size: int, channels: int):
        """Builds the layers of `model`, with its names."""
        super().__init__()
        assert model.likelihood is not None  # every configuration has one
        self.posterior, self.min_sigma = model.posterior, model.likelihood.min_sigma
        self.low_precision = model.decoder.style.dtype == "bfloat16"
        self.encoder, self.decoder, self.unused = nn.ModuleDict(), nn.ModuleDict(), []
        size, features = image_size, channels
        for i, layer in enumerate(model.encoder.layers):
            kernel, stride = layer.kernel, layer.strides[0]
            after = convolutions.output_size(size, kernel, stride, layer.paddings[0])
            outside = (after - 1) * stride + kernel - size  # pixels that the kernels reach
            padding = math.ceil(max(outside, 0) / 2)
            self.unused.append(max(-outside, 0))
            convolution = nn.Conv2d(features, layer.features, kernel, stride, padding, bias=False)
            self.encoder[f"Block_{i}"] = _block(convolution)
            size, features = after, layer.features
        self.encoder["Dense_0"] = nn.Linear(size**2 * features, model.posterior.num_params)
        scale = torch.from_numpy(model.posterior.output_scale)
        self.register_buffer("scale", scale, persistent=False)
        *blocks, last = model.decoder.layers
        features = model.posterior.maps
        for i, layer in enumerate(blocks):
            self.decoder[f"Block_{i}"] = _block(_transposed(layer, features, bias=False))
            features = layer.features
        self.decoder["Convolution_0"] = _transposed(last, features, bias=True)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to the posteriors' parameters, [b, p]."""
        *blocks, dense = self.encoder.values()
        x = images.permute(0, 3, 1, 2)
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=self.low_precision):
            for block, unused in zip(blocks, self.unused, strict=True):
                # VALID leaves out the last pixels, and so, mirrored, the first.
                x = block(x[:, :, unused:, unused:])
        return dense(x.float().permute(0, 2, 3, 1).flatten(1)) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latent maps to the means of the pixels."""
        *blocks, last = self.decoder.values()
        x = z.permute(0, 3, 1, 2)
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=self.low_precision):
            for block in blocks:
                x = block(x)
        return last(x.float()).tanh().permute(0, 2, 3, 1)

    def losses(self, pixels: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Loss, reconstruction and KL of uint8 images, in nats an image."""
        images = (pixels.float() - 127.5) / 127.5
        mean, log_variance, kl = posterior(self.posterior, self.encode(images))
        noise = torch.randn_like(mean) if noise is None else noise
        means = self.decode(mean + (0.5 * log_variance).exp() * noise)
        num_dims, kl = images[0].numel(), kl.mean()
        error = (images - means).square().sum((1, 2, 3)).mean()
        variance = (error / num_dims).detach().clamp(min=self.min_sigma**2)
        constant = num_dims * (variance.log() + math.log(2 * math.pi))
        reconstruction = -0.5 * (error / variance + constant)
        return {"loss": kl - reconstruction, "reconstruction": reconstruction, "kl": kl}


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    norm = nn.BatchNorm2d(convolution.out_channels)
    layers = {"Convolution_0": convolution, "BatchNorm_0": norm, "activation": nn.ELU()}
    return nn.Sequential(OrderedDict(layers))


def _transposed(layer: Layer, features: int, bias: bool) -> nn.ConvTranspose2d:
    kernel, stride = layer.kernel, layer.strides[0]
    padding = extra = 0
    if layer.paddings[0] == "SAME":
        half, extra = divmod(kernel + stride - 2, 2)
        padding = kernel - 1 - half
    return nn.ConvTranspose2d(
        features, layer.features, kernel, stride, padding, output_padding=extra, bias=bias
    )


def posterior(family: latents.Posterior, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and log-variance of every entry, [b, h, w, n], and the KL, [b]."""
    sizes = [math.prod(shape) for shape in family.shapes.values()]
    split = zip(family.shapes.items(), flat.split(sizes, 1), strict=True)
    parts = {name: part.unflatten(1, shape) for (name, shape), part in split}
    if "mean" in parts:
        mean = parts["mean"]
    else:
        mean = (parts["mu"][:, :, None] * parts["nu"][:, None]).sum(-2)
    if "log_variance" in parts:
        log_variance = parts["log_variance"]
    else:
        log_variance = parts["row_log_variance"][:, :, None] + parts["col_log_variance"][:, None]
    kl = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum((1, 2, 3))
    return mean, log_variance, kl


def translated(model: SpatialVAE, *trees: PyTree) -> dict[str, np.ndarray]:
    """Our parameters (or their gradients) and batch statistics, mirrored, by PyTorch's names."""
    columns, features = mirrored_columns(model.posterior), model.encoder.layers[-1].features
    named = {}
    for path, value in (
        item for tree in trees for item in traverse_util.flatten_dict(tree).items()
    ):
        array, (*modules, name) = np.asarray(value), path
        if "Dense_0" in modules:
            array = array[..., columns]
            if name == "kernel":  # from positions and features, of which positions turn around
                array = array.reshape(-1, features, len(columns))[::-1].reshape(array.shape).T
        elif array.ndim == 4 and "encoder" in modules:
            array = np.flip(array, (0, 1)).transpose(3, 2, 0, 1)
        elif array.ndim == 4:
            # PyTorch, too, mirrors a transposed convolution's kernel: both change nothing.
            array = array.transpose(2, 3, 0, 1)
        named[".".join([*modules, _NAMES.get(name, name)])] = np.ascontiguousarray(array)
    return named


def mirrored_columns(posterior: latents.Posterior) -> np.ndarray:
    """Which of our posterior's parameters stands where, when the maps are mirrored."""
    columns, start = [], 0
    for *sides, maps in posterior.shapes.values():
        numbers = np.arange(start, start + math.prod(sides) * maps).reshape(-1, maps)
        columns.append(numbers[::-1].ravel())  # the order of ranks does not matter
        start += numbers.size
    return np.concatenate(columns)


def make(recipe: Recipe, variables: PyTree) -> Network:
    """The network, channels last, with a copy of our parameters and batch statistics."""
    torch.set_num_threads(os.cpu_count() or 1)
    values = translated(recipe.model, *jax.device_get(variables).values())
    network = Network(recipe.model, *recipe.image_shape[1:])
    # Not strict: PyTorch's norms also count their batches.
    tensors = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    network.load_state_dict(tensors, strict=False)
    return network.to(_DEVICE, memory_format=torch.channels_last)


def numbers(
    network: Network, pixels: workloads.Images, noise: Float[np.ndarray, "b h w n"]
) -> dict[str, Any]:
    """Losses and gradients of a batch and its noise, and the images decoded from the noise."""

    def mirrored(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flip(array, (1, 2)).copy()).to(_DEVICE)

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        images = np.flip(network.eval().decode(mirrored(noise)).cpu().numpy(), (1, 2))
    losses = network.train().losses(mirrored(pixels), mirrored(noise))
    losses["loss"].backward()
    gradients = {name: p.grad.cpu().numpy() for name, p in network.named_parameters()}
    losses = {name: loss.item() for name, loss in losses.items()}
    return losses | {"images": images, "gradients": gradients}


def contender(
    part: str, recipe: Recipe, images: workloads.Images, count: int, compiled: bool
) -> Contender:
    """Training steps on random batches, or generation of `count` images at a time."""
    # A GPU may round the factors of float32 products, as JAX does by default.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    network = make(recipe, workloads.initial_variables(recipe)).train(part == "training")
    work: Any = network.losses if part == "training" else network.decode
    if compiled:
        # On a GPU, launching the kernels of so small a network takes longer than running them.
        work = torch.compile(work, mode="reduce-overhead" if _DEVICE == "cuda" else None)
    on_device = torch.from_numpy(images).to(_DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    posterior = recipe.model.posterior
    shape = (count, posterior.height, posterior.width, posterior.maps)

    def train() -> None:
        chosen = torch.randint(len(images), (recipe.batch_size,), device=_DEVICE)
        work(on_device[chosen])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def generate() -> None:
        work(torch.randn(shape, device=_DEVICE))

    def run(units: int) -> None:
        for _ in range(units):
            train() if part == "training" else generate()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
