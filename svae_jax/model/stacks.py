"""Stacks of layers as text, their sizes, and the stacks that follow from sizes.

A stack has one word a layer, for instance the CelebA encoder

    5x5/32/s2 5x5/64/s2 5x5/128/s2/valid

is three 5×5 convolutions to 32, 64 and 128 features, each of stride 2, the last without padding.
In a decoder the features of the last layer are the word `image`: as many as the likelihood takes,
which for most likelihoods are the channels of the images.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from svae_jax.model import convolutions
from svae_jax.model.convolutions import Padding
from svae_jax.model.layers import Layer, Style

# The layer in front of a vector's decoder takes a map of size 1 to this size.
VECTOR_START = 3


_MOST = 2**16
_EXAMPLES = {"encoder": "5x5/32/s2 5x5/64/s2/valid", "decoder": "3x3/128 3x3/64 5x5/image/s2"}
_WORD = re.compile(r"(\d+)x(\d+)/(\d+|image)(?:/s(\d+))?(/valid)?")


def parse(stack: str, num_outputs: int | None = None) -> tuple[Layer, ...]:
    """Read a stack of layers from its text (see the module's docstring).

    Args:
        stack: words such as `5x5/32/s2/valid`; stride 1 and SAME padding where none is given.
        num_outputs: what `image` stands for; None in an encoder, where the word is refused.

    Raises:
        ValueError: an empty stack, or a word that is not a layer.
    """
    if not stack.split():
        raise ValueError(
            f"a stack needs at least one layer, as in {_example(num_outputs)!r}, or is 'auto'"
        )
    return tuple(_parse_word(word, num_outputs) for word in stack.split())


def _parse_word(word: str, num_outputs: int | None) -> Layer:
    match = _WORD.fullmatch(word)
    if match is None or match[1] != match[2]:
        raise ValueError(
            f"{word!r} is not a layer: write KxK/FEATURES, then /sSTRIDE and /valid where wanted, "
            f"as in {_example(num_outputs)!r}"
        )
    if match[3] != "image":
        features = int(match[3])
    elif num_outputs is not None:
        features = num_outputs
    else:
        raise ValueError(f"{word!r}: only a decoder's last layer makes an image")
    kernel, stride = int(match[1]), int(match[4] or 1)
    if not 1 <= min(kernel, features, stride) <= max(kernel, features, stride) <= _MOST:
        raise ValueError(f"{word!r}: kernel, features and stride must be from 1 to {_MOST:,}")
    padding: Padding = "VALID" if match[5] else "SAME"
    return Layer(kernel, features, (stride, stride), (padding, padding))


def _example(num_outputs: int | None) -> str:
    return _EXAMPLES["encoder" if num_outputs is None else "decoder"]


def growth(size: int, target: int) -> tuple[tuple[int, Padding], tuple[int, Padding]]:
    """How a decoder's first two 3x3 layers take a map of `size` rows to at least `target`.

    Both strides are as equal as they can be without overshooting; what is then missing is the
    overhang of a VALID second layer where that is enough, else one more of the second stride.

    Returns:
        (stride, padding) of each of the two layers.

    Raises:
        ValueError: the target is below `size`, or above 9 · `size`: kernels of 3 would leave holes.
    """
    if not size <= target <= 9 * size:
        raise ValueError(f"must be {-(-target // 9)} to {target}, got {size}")
    first = math.isqrt(target // size - 1) + 1  # the root, rounded up
    second = target // (size * first)
    padding: Padding = "SAME"
    if (reached := size * first * second) < target:
        if reached + max(3 - second, 0) >= target:
            padding = "VALID"
        else:
            second += 1
    return (first, "SAME"), (second, padding)


def decoder_layers(
    stack: str,
    *,
    height: int,
    width: int,
    image_size: tuple[int, int],
    num_outputs: int,
) -> tuple[Layer, ...]:
    """Fits a decoder's stack to maps of height × width.

    The first two layers are 3x3, and their strides and padding follow from the sizes, so that the
    weights do not depend on them: they grow the maps until the layers after them make at least the
    image, from which `Decoder` crops it.

    Args:
        stack: its text.
        height: rows of a latent map.
        width: its columns.
        image_size: height and width of an image.
        num_outputs: what the likelihood takes.

    Raises:
        ValueError: the stack does not begin with two plain 3x3 layers or does not end in `image`,
            or the two cannot grow the maps so far; it lists the sizes from which they can.
    """
    layers = parse(stack, num_outputs)
    if not stack.split()[-1].split("/")[1] == "image" or stack.count("image") > 1:
        raise ValueError(
            f"the last layer, and no other, must have the features 'image', as in "
            f"{_example(num_outputs)!r}, got {stack!r}"
        )
    if len(layers) < 3 or any(layer != Layer(3, layer.features) for layer in layers[:2]):
        raise ValueError(
            "a decoder begins with two layers 3x3/FEATURES without stride or padding "
            f"(both follow from the latent's size) and has one more at least, as in "
            f"{_example(num_outputs)!r}, got {stack!r}"
        )
    axes = []
    for name, size, pixels in zip(("height", "width"), (height, width), image_size, strict=True):
        target = next(t for t in range(1, pixels + 1) if _grown(layers[2:], t) >= pixels)
        try:
            axes.append(growth(size, target))
        except ValueError as error:
            raise ValueError(
                f"latent.{name} {error}: what {stack!r} grows to {pixels} pixels"
            ) from None
    grown = tuple(
        dataclasses.replace(layer, strides=(rows[0], cols[0]), paddings=(rows[1], cols[1]))
        for layer, rows, cols in zip(layers, *axes, strict=False)
    )
    return grown + layers[2:]


def _grown(layers: Sequence[Layer], size: int) -> int:
    """The length of one axis after transposed convolutions."""
    for layer in layers:
        size = convolutions.transposed_output_size(
            size, layer.kernel, layer.strides[0], layer.paddings[0]
        )
    return size


# Stacks that follow from sizes.

_FIRST_FEATURES, _MOST_FEATURES = 32, 128  # of an encoder's strided layers; each doubles them
_DENSE_SIDE = 4  # rows or columns that are left for a dense head, at least
# Decoders have the size of this stack for latents of so many maps.
_REFERENCE, _REFERENCE_MAPS = "3x3/128 3x3/64 5x5/32/s2 5x5/image/s2", 128


def encoder_for(image_size: tuple[int, int], cells: tuple[int, int] | None) -> str:
    """An encoder's stack: halvings down to the latent's cells, or to what a dense head takes.

    Args:
        image_size: height and width of an image.
        cells: height and width of a latent map, for a convolutional head; None for a dense one.
    """
    least = cells or (_DENSE_SIDE, _DENSE_SIDE)
    halvings = _halvings(image_size, least)
    features = [min(_FIRST_FEATURES * 2**i, _MOST_FEATURES) for i in range(halvings)]
    return " ".join([*(f"5x5/{count}/s2" for count in features), f"3x3/{2 * _MOST_FEATURES}"])


def decoder_for(image_size: tuple[int, int], cells: tuple[int, int], maps: int) -> str:
    """A decoder's stack: two 3x3 layers, then one that doubles for each halving of the image.

    It has as many parameters as the decoder of the paper's CIFAR-10 model.

    Args:
        image_size: height and width of an image.
        cells: height and width of a latent map.
        maps: the number of maps.
    """
    doublings = _halvings(image_size, cells)
    inner = [f"5x5/{max(16, 32 // 2**i)}/s2" for i in range(doublings - 1)]
    last = "5x5/image/s2" if doublings else "5x5/image"
    reference = parse(_REFERENCE, num_outputs=3)
    target = num_decoder_params(reference, _REFERENCE_MAPS, Style())
    return _with_size(" ".join(["3x3/128 3x3/64", *inner, last]), maps, target)


def _halvings(image_size: tuple[int, int], least: tuple[int, int]) -> int:
    """How often both sides can be halved, so that no less than `least` is left."""
    halvings = 0
    while all(-(-n >> halvings + 1) >= k for n, k in zip(image_size, least, strict=True)):
        halvings += 1
    return halvings


def vector_decoder_layers(
    stack: str,
    *,
    maps: int,
    parity_maps: int,
    image_size: tuple[int, int],
    num_outputs: int,
    style: Style,
) -> tuple[Layer, ...]:
    """The decoder of a vector latent: one more layer in front, 3x3 VALID, from 1×1 to 3×3.

    Its width is solved so that this decoder has as many parameters, within 1%, as the decoder of
    spatial latents of `parity_maps` maps has with the same stack.

    Raises:
        ValueError: as `decoder_layers`, and where no width comes within 1%.
    """
    spatial = decoder_layers(
        stack,
        height=VECTOR_START,
        width=VECTOR_START,
        image_size=image_size,
        num_outputs=num_outputs,
    )

    front = Layer(VECTOR_START, 1, paddings=("VALID", "VALID"))
    target = num_decoder_params(spatial, parity_maps, style)
    layers = fitted_width((front, *spatial), maps, style, target)
    reached = num_decoder_params(layers, maps, style)
    if abs(reached - target) > 0.01 * target:
        raise ValueError(
            f"no width of the vector's first layer comes within 1% of the {target} parameters "
            f"that parity_maps={parity_maps} maps have (nearest: {reached}); take more parity_maps "
            "or fewer maps"
        )
    return layers


def fitted_width(
    layers: Sequence[Layer], maps: int, style: Style, target: int
) -> tuple[Layer, ...]:
    """The layers, the first as wide as brings `Decoder` nearest to `target` parameters."""

    def of_width(features: int) -> tuple[Layer, ...]:
        return (dataclasses.replace(layers[0], features=features), *layers[1:])

    one, two = (num_decoder_params(of_width(width), maps, style) for width in (1, 2))
    # The number is affine in the width.
    return of_width(max(1, round(1 + (target - one) / (two - one))))


def matching_stack(stack: str, *, maps: int, like: int) -> str:
    """The stack with a first layer of such a width that both decoders have nearly the same size.

    Args:
        stack: of a decoder of `like` maps.
        maps: the number of maps that the returned stack decodes.
        like: the number of maps that `stack` decodes.
    """
    layers, style = parse(stack, num_outputs=3), Style()
    return _with_size(stack, maps, num_decoder_params(layers, like, style))


def _with_size(stack: str, maps: int, size: int) -> str:
    """The stack with a first layer that brings it nearest to `size` parameters for RGB images."""
    fitted = fitted_width(parse(stack, num_outputs=3), maps, Style(), size)
    first, *others = stack.split()
    kernel, _, *rest = first.split("/")
    return " ".join(["/".join([kernel, str(fitted[0].features), *rest]), *others])


def num_decoder_params(layers: Sequence[Layer], in_features: int, style: Style) -> int:
    """Number of weights that `Decoder(layers, style)` has for latents of `in_features` maps."""
    total = 0
    for i, layer in enumerate(layers):
        total += layer.kernel**2 * in_features * layer.features
        bias_only = i == len(layers) - 1 or style.norm == "none"
        total += layer.features * (1 if bias_only else 2)  # bias, or the norm's scale and bias
        in_features = layer.features
    return total


def encoder_size(layers: Sequence[Layer], image_size: int) -> int:
    """Length of the encoder's last feature map.

    Raises:
        ValueError: where a layer leaves nothing of it.
    """
    size = image_size
    for layer in layers:
        before = size
        size = convolutions.output_size(size, layer.kernel, layer.strides[0], layer.paddings[0])
        if size < 1:
            raise ValueError(
                f"a {layer.kernel}x{layer.kernel} layer leaves nothing of {before} pixels"
            )
    return size
