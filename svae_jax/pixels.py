"""What the values of pixels mean: the images' own dtype and range, and [-1, 1] for the model."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

DTYPES = ("uint8", "uint16", "float16", "float32", "float64")


@dataclass(frozen=True)
class PixelRange:
    """The dtype of images and the range of values that the model sees as [-1, 1].

    Attributes:
        dtype: one of `DTYPES`.
        low: the value that becomes -1; an integer for integers.
        high: the value that becomes 1.
        is_inferred: whether the range is that of the training images, so that others may lie
            beyond. It matters for integers alone (see `ends`).

    Raises:
        ValueError: another dtype, a range that is empty or not finite, or one that does not fit
            the dtype.
    """

    dtype: str = "uint8"
    low: float = 0.0
    high: float = 255.0
    is_inferred: bool = False

    def __post_init__(self):
        """Validates dtype, low and high."""
        if self.dtype not in DTYPES:
            raise ValueError(f"pixels must be of one of {', '.join(DTYPES)}, got {self.dtype}")
        low, high = self.low, self.high
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(
                f"a range must be two finite numbers, LOW below HIGH, got {low},{high}"
            )
        if self.is_integer:
            largest = np.iinfo(self.dtype).max
            if not (low == int(low) >= 0 and high == int(high) <= largest):
                raise ValueError(
                    f"a range of {self.dtype} must be two integers from 0 to {largest}, got "
                    f"{low:g},{high:g}"
                )

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers, so that each has a probability mass."""
        return bool(np.issubdtype(self.dtype, np.integer))

    @property
    def num_levels(self) -> int | None:
        """How many integers the range holds; None for floats."""
        return int(self.high - self.low) + 1 if self.is_integer else None

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last integer that there can be, in [-1, 1] or beyond.

        Their bins take the tails of a likelihood, so that the masses of all integers sum to 1.
        They are low and high; of an inferred range, the smallest and largest that the dtype holds.
        """
        if not self.is_inferred or not self.is_integer:
            return -1.0, 1.0
        center, half = self._center_and_half()
        return -center / half, (float(np.iinfo(self.dtype).max) - center) / half

    @property
    def half_bin(self) -> float:
        """Half the distance in [-1, 1] of two neighbouring integers."""
        return 1.0 / (self.high - self.low)

    def to_float(self, pixels: Num[Array | np.ndarray, "*s"]) -> Float[Array, "*s"]:
        """Maps pixels to float32, `low` to -1 and `high` to 1; values beyond go beyond."""
        center, half = self._center_and_half()
        # Not x / half - 1: compiled, the division becomes a product, and white lies above 1.
        return (jnp.asarray(pixels).astype(jnp.float32) - center) / half

    def from_float(self, values: Num[Array | np.ndarray, "*s"]) -> Num[np.ndarray, "*s"]:
        """Maps values in [-1, 1] to the images' own units and dtype: the inverse of `to_float`.

        Integers are rounded and clipped to the range. This runs on the host, in float64.
        """
        center, half = self._center_and_half()
        pixels = np.asarray(values, np.float64) * half + center
        if self.is_integer:
            pixels = np.clip(np.round(np.nan_to_num(pixels, nan=self.low)), self.low, self.high)
            return pixels.astype(self.dtype)
        largest = float(np.finfo(self.dtype).max)
        return np.clip(pixels, -largest, largest).astype(self.dtype)

    def _center_and_half(self) -> tuple[float, float]:
        return (self.low + self.high) / 2, (self.high - self.low) / 2


UINT8 = PixelRange()
"""8-bit images."""


def to_uint8(values: Float[Array | np.ndarray, "*s"]) -> UInt8[Array, "*s"]:
    """Maps values in [-1, 1] to uint8, rounding and clipping: what a picture file holds."""
    # In float32: bfloat16 holds 8 significant bits and would miss levels.
    levels = jnp.round((jnp.asarray(values).astype(jnp.float32) + 1.0) * 127.5)
    return jnp.where(jnp.isnan(levels), 0, jnp.clip(levels, 0, 255)).astype(jnp.uint8)
