"""The same network and training step as PyTorch users write them, with PyTorch's own layers.

Where SAME padding is not symmetrical, JAX pads more on the right and PyTorch's layers more on the
left. So with mirrored parameters (`translated`) the PyTorch network computes the mirror image of
everything, at the same cost. Explicit padding and cropping would make PyTorch slower.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float, PyTree
from torch import Tensor, nn

from experiments.benchmark.stopwatch import Contender
from experiments.benchmark.workloads import Images
from svae_jax import latents
from svae_jax.model import SpatialVAE, convolutions
from svae_jax.model.layers import Layer
from svae_jax.recipe import Recipe

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Network(nn.Module):
    """Encoder, posterior and decoder; images and latents are channels last, [b, h, w, c]."""

    def __init__(self, model: SpatialVAE, image_size: int, channels: int):
        """Builds the layers of `model`."""
        super().__init__()
        assert model.likelihood is not None  # every configuration has one
        self.posterior, self.min_sigma = model.posterior, model.likelihood.min_sigma
        self.low_precision = model.decoder.style.dtype == "bfloat16"
        self.encoder, self.decoder, self.unused = nn.ModuleList(), nn.ModuleList(), []
        size, features = image_size, channels
        for layer in model.encoder.layers:
            kernel, stride = layer.kernel, layer.strides[0]
            after = convolutions.output_size(size, kernel, stride, layer.paddings[0])
            outside = (after - 1) * stride + kernel - size  # pixels that the kernels reach
            padding = math.ceil(max(outside, 0) / 2)
            self.unused.append(max(-outside, 0))
            convolution = nn.Conv2d(features, layer.features, kernel, stride, padding, bias=False)
            self.encoder.append(_block(convolution))
            size, features = after, layer.features
        self.dense = nn.Linear(size**2 * features, model.posterior.num_params)
        scale = torch.from_numpy(model.posterior.output_scale)
        self.register_buffer("scale", scale, persistent=False)
        features = model.posterior.maps
        for layer in model.decoder.layers[:-1]:
            self.decoder.append(_block(_transposed(layer, features, bias=False)))
            features = layer.features
        self.last = _transposed(model.decoder.layers[-1], features, bias=True)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to the posteriors' numbers, [b, p]."""
        x = images.permute(0, 3, 1, 2)
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=self.low_precision):
            for block, unused in zip(self.encoder, self.unused, strict=True):
                # VALID leaves out the last pixels, and so, mirrored, the first.
                x = block(x[:, :, unused:, unused:])
        return self.dense(x.float().permute(0, 2, 3, 1).flatten(1)) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latent maps to the means of the pixels."""
        x = z.permute(0, 3, 1, 2)
        with torch.autocast(_DEVICE, torch.bfloat16, enabled=self.low_precision):
            for block in self.decoder:
                x = block(x)
        return self.last(x.float()).tanh().permute(0, 2, 3, 1)

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
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ELU())


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


def translated(
    model: SpatialVAE, params: PyTree, batch_stats: PyTree = None
) -> dict[str, np.ndarray]:
    """Our parameters (or their gradients) and batch statistics, mirrored, by PyTorch's names."""
    named = {}
    for side, axes in (("encoder", (3, 2, 0, 1)), ("decoder", (2, 3, 0, 1))):
        for i in range(len(params[side]) - 1):
            name, block = f"{side}.{i}", params[side][f"Block_{i}"]
            kernel = np.asarray(block["Convolution_0"]["kernel"])
            # PyTorch, too, mirrors a transposed convolution's kernel: both together change nothing.
            mirrored = np.flip(kernel, (0, 1)) if side == "encoder" else kernel
            named[f"{name}.0.weight"] = mirrored.transpose(axes)
            named[f"{name}.1.weight"] = block["BatchNorm_0"]["scale"]
            named[f"{name}.1.bias"] = block["BatchNorm_0"]["bias"]
            if batch_stats is not None:
                tracked = batch_stats[side][f"Block_{i}"]["BatchNorm_0"]
                named[f"{name}.1.running_mean"] = tracked["mean"]
                named[f"{name}.1.running_var"] = tracked["var"]
                named[f"{name}.1.num_batches_tracked"] = np.asarray(0)
    last, dense = params["decoder"]["Convolution_0"], params["encoder"]["Dense_0"]
    named["last.weight"] = np.asarray(last["kernel"]).transpose(2, 3, 0, 1)
    named["last.bias"] = last["bias"]
    kernel, columns = np.asarray(dense["kernel"]), mirrored_columns(model.posterior)
    # From the order of positions and features, of which positions turn around.
    features = model.encoder.layers[-1].features
    kernel = np.flip(kernel.reshape(-1, features, kernel.shape[1]), 0).reshape(kernel.shape)
    named["dense.weight"] = kernel[:, columns].T
    named["dense.bias"] = np.asarray(dense["bias"])[columns]
    return {name: np.array(value) for name, value in named.items()}


def mirrored_columns(posterior: latents.Posterior) -> np.ndarray:
    """Which of our posterior's numbers stands where, when the maps are mirrored."""
    columns, start = [], 0
    for *sides, maps in posterior.shapes.values():
        numbers = np.arange(start, start + math.prod(sides) * maps).reshape(-1, maps)
        columns.append(numbers[::-1].ravel())  # the order of ranks does not matter
        start += numbers.size
    return np.concatenate(columns)


def make(recipe: Recipe, variables: PyTree) -> Network:
    """The network, channels last, with a copy of our parameters and batch statistics."""
    torch.set_num_threads(os.cpu_count() or 1)
    values = translated(recipe.model, **jax.device_get(variables))
    network = Network(recipe.model, *recipe.image_shape[1:])
    network.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return network.to(_DEVICE, memory_format=torch.channels_last)


def numbers(
    network: Network, pixels: Images, noise: Float[np.ndarray, "b h w n"]
) -> dict[str, Any]:
    """Losses and gradients of a batch and its noise, and the images decoded from the noise."""

    def mirrored(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flip(array, (1, 2)).copy()).to(_DEVICE)

    _allow_tf32(False)
    with torch.inference_mode():
        images = np.flip(network.eval().decode(mirrored(noise)).cpu().numpy(), (1, 2))
    losses = network.train().losses(mirrored(pixels), mirrored(noise))
    losses["loss"].backward()
    gradients = {name: p.grad.cpu().numpy() for name, p in network.named_parameters()}
    losses = {name: loss.item() for name, loss in losses.items()}
    return losses | {"images": images, "gradients": gradients}


def training(network: Network, recipe: Recipe, images: Images, compiled: bool) -> Contender:
    """Updates, each with a random batch of images that are on the device."""
    on_device = torch.from_numpy(images).to(_DEVICE)
    losses = _compiled(network.train().losses, compiled)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def update() -> None:
        chosen = torch.randint(len(images), (recipe.batch_size,), device=_DEVICE)
        losses(on_device[chosen])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _repeated(update)


def generation(network: Network, recipe: Recipe, count: int, compiled: bool) -> Contender:
    """Batches of images generated from the prior."""
    decode, posterior = _compiled(network.eval().decode, compiled), recipe.model.posterior
    shape = (count, posterior.height, posterior.width, posterior.maps)
    return _repeated(torch.inference_mode()(lambda: decode(torch.randn(shape, device=_DEVICE))))


def _compiled(function: Callable, compiled: bool) -> Callable:
    # On a GPU, launching the kernels of so small a network takes longer than running them.
    mode = "reduce-overhead" if _DEVICE == "cuda" else None
    return torch.compile(function, mode=mode) if compiled else function


def _repeated(work: Callable[[], Any]) -> Contender:
    _allow_tf32(True)

    def run(units: int) -> None:
        for _ in range(units):
            work()
        if _DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def _allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products, as JAX does by default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
