"""What a run will take, estimated from sizes alone, before anything compiles."""

import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from svae_jax import model as models
from svae_jax import terminal
from svae_jax.model import SpatialVAE, convolutions, networks
from svae_jax.training import feed
from svae_jax.training.job import Job

# The share of the FLOP/s of a matrix product on this CPU that training reaches, and the FLOP/s
# that are assumed of an accelerator.
_CPU_SHARE, _ACCELERATOR_FLOPS = 0.5, 1e13
_COPIES_OF_PARAMS = 4  # parameters, gradients and Adam's two moments
# Of a layer's output: before its norm, after it, its gradient, and what convolutions and the
# compiler make of them; measured on a CPU (experiments/measurements.md, "Images of one's own").
_COPIES_OF_FEATURES = 6
_CPU_PROCESS = 1.5e9  # bytes of libraries and compiler, which an accelerator's memory does not hold
_PASSES = 3  # forward, and backward in the input and in the kernel


def summary(job: Job) -> str:
    """Parameters, memory and seconds an epoch, as one line.

    Memory is that of one device, and on a CPU that of the process. Both are rough: they are
    multiples of the networks' features and multiply-adds, and the images that live on the device.
    """
    shape = job.recipe.image_shape
    variables = jax.eval_shape(lambda: models.init(job.recipe.model, jax.random.key(0), shape))
    sizes = models.num_params(variables["params"])
    text = ", ".join(f"{part} {count:,}" for part, count in sizes.items())
    line = f"parameters: {text}; {job.recipe.model.num_latents:,} latents an image"
    if not isinstance(job.recipe.model.encoder, networks.Encoder):
        return line
    layers = list(_layers(job.recipe.model))
    batch = job.recipe.batch_size / job.mesh.size
    features = _COPIES_OF_FEATURES * batch * sum(size for size, _ in layers)
    memory = 4 * (features + _COPIES_OF_PARAMS * sum(sizes.values()))
    if jax.default_backend() == "cpu":  # all devices of the process are in its memory
        memory = memory * len(job.mesh.local_devices) + _CPU_PROCESS
    if feed.is_resident(job.train_images, job.mesh, job.config.dataset.resident_share):
        memory += job.train_images.nbytes
    flops = 2 * _PASSES * sum(products for _, products in layers) * len(job.train_images)
    seconds = flops / (_flops_per_second() * job.mesh.size)
    return (
        f"{line}; about {memory / 1e9:.2g} GB of memory and {terminal.duration(seconds)} an epoch"
    )


def _layers(model: SpatialVAE) -> Iterator[tuple[int, int]]:
    """The number of features and of multiply-adds of each layer, for one image."""
    encoder, decoder, posterior = model.encoder, model.decoder, model.posterior
    assert model.likelihood is not None  # the configuration sets it
    *size, channels = model.likelihood.image_shape
    for layer in encoder.layers:
        axes = zip(size, layer.strides, layer.paddings, strict=True)
        size = [convolutions.output_size(n, layer.kernel, s, padding) for n, s, padding in axes]
        positions = math.prod(size)
        yield positions * layer.features, positions * layer.kernel**2 * channels * layer.features
        channels = layer.features
    cells = posterior.height * posterior.width
    inputs = channels * (math.prod(size) if encoder.head == "dense" else 1)
    yield posterior.num_params, inputs * posterior.num_params
    size, channels = [posterior.height, posterior.width], posterior.maps
    for layer in decoder.layers:
        products = math.prod(size) * layer.kernel**2 * channels * layer.features
        axes = zip(size, layer.strides, layer.paddings, strict=True)
        size = [
            convolutions.transposed_output_size(n, layer.kernel, s, padding)
            for n, s, padding in axes
        ]
        yield math.prod(size) * layer.features, products
        channels = layer.features
    if model.linear is not None:
        products = 2 * cells * model.linear.patch_size * posterior.maps
        yield 2 * math.prod(model.likelihood.image_shape), products


def _flops_per_second() -> float:
    """Of training on one device."""
    if jax.default_backend() != "cpu":
        return _ACCELERATOR_FLOPS
    size, seconds = 512, []
    matrix = np.ones((size, size), np.float32)
    for _ in range(4):
        begin = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begin)
    return _CPU_SHARE * 2 * size**3 / min(seconds) / jax.device_count()
