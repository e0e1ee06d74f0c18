"""The velocity of a flow: a small transformer whose tokens are patches of a latent's cells."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from svae_jax.samplers.base import Shape

_FREQUENCIES = 32  # of the features of t
_HEAD = 48  # features of an attention head
MAX_TOKENS = 16  # a step takes about as long as its tokens are many


class Velocity(nn.Module):
    """v(x, t) for latents x ``[b, tokens, channels]`` (see `to_patches`) and times t ``[b]``.

    Pre-norm blocks of self-attention and an MLP, modulated by t through adaptive layer norms, whose
    scales, shifts and gates start at zero (DiT, Peebles and Xie 2023; one projection of t for all
    blocks and a learned offset for each, as in PixArt-α). The output starts at zero.

    Attributes:
        tokens: patches of a latent.
        channels: entries of a patch.
        width: features of a token.
        depth: blocks.
        hidden: features of the MLP's hidden layer.
    """

    tokens: int
    channels: int
    width: int
    depth: int
    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b tokens channels"], t: Float[Array, " b"]
    ) -> Float[Array, "b tokens channels"]:
        """The velocity, of x's shape."""
        angles = t[:, None] * jnp.geomspace(1.0, 1000.0, _FREQUENCIES)
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        time = nn.Dense(6 * self.width, name="modulation")(
            nn.silu(nn.Dense(self.width, name="time")(features))
        )
        positions = self.param("positions", nn.initializers.normal(0.02), (self.tokens, self.width))
        h = nn.Dense(self.width, name="input")(x) + positions
        for i in range(self.depth):
            offset = self.param(f"offset_{i}", nn.initializers.zeros, (6 * self.width,))
            h = Block(self.width, self.hidden, name=f"block_{i}")(h, time + offset)
        return nn.Dense(self.channels, kernel_init=nn.initializers.zeros, name="output")(
            nn.LayerNorm(name="norm")(h)
        )


class Block(nn.Module):
    """Self-attention and an MLP, each behind a layer norm whose scale and shift are given."""

    width: int
    hidden: int

    @nn.compact
    def __call__(
        self, h: Float[Array, "b tokens width"], modulation: Float[Array, "b six_widths"]
    ) -> Float[Array, "b tokens width"]:
        """The tokens after the block; `modulation` holds two scales, shifts and gates."""
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = jnp.split(
            modulation[:, None], 6, axis=-1
        )
        x = nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + scale_1) + shift_1
        heads = max(1, self.width // _HEAD)
        h = h + gate_1 * nn.MultiHeadDotProductAttention(num_heads=heads, name="attention")(x)
        x = nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + scale_2) + shift_2
        x = nn.gelu(nn.Dense(self.hidden, name="up")(x))
        return h + gate_2 * nn.Dense(self.width, name="down")(x)


def make(shape: Shape, *, width: int, depth: int, num_params: int) -> Velocity:
    """A network of about `num_params` parameters for latents of this shape.

    The width of the MLP's hidden layer is solved for, so that latents of different shapes get
    networks of the same size.

    Args:
        shape: height, width and maps of a latent.
        width: features of a token, a multiple of the number of heads.
        depth: blocks, at least 1.
        num_params: how many parameters; met within half of 2·width·depth.

    Raises:
        ValueError: without any MLP the network would already be larger.
    """
    height, columns = patch(shape)
    channels = height * columns * shape[2]
    tokens = shape[0] * shape[1] // (height * columns)

    def network(hidden: int) -> Velocity:
        return Velocity(tokens, channels, width, depth, hidden)

    smallest = count_params(network(1))
    each = count_params(network(2)) - smallest
    hidden = 1 + round((num_params - smallest) / each)
    if hidden < 1:
        raise ValueError(
            f"num_params must be at least {smallest} for latents of shape {shape}, width={width} "
            f"and depth={depth}, got num_params={num_params}"
        )
    return network(hidden)


def patch(shape: Shape) -> tuple[int, int]:
    """Height and width, in cells, of the patches that are the tokens of a latent.

    Of the patches into which the latent divides, `MAX_TOKENS` of them at most, those with the
    shortest longer side. Latents of 16 cells or fewer have a token for each cell, and a latent with
    large prime sides, such as 17×17, is a single token.
    """
    height, width, _ = shape
    sides = ([d for d in range(1, side + 1) if side % d == 0] for side in (height, width))
    allowed = [(h, w) for h, w in itertools.product(*sides) if height * width <= MAX_TOKENS * h * w]
    return min(allowed, key=lambda sides: (max(sides), sides[0] * sides[1]))


def to_patches(flat: Float[Array, "b d"], shape: Shape) -> Float[Array, "b tokens channels"]:
    """Latents as tokens: patch by patch, row by row."""
    height, width, maps = shape
    h, w = patch(shape)
    cells = flat.reshape(-1, height // h, h, width // w, w, maps)
    return cells.swapaxes(2, 3).reshape(len(flat), -1, h * w * maps)


def from_patches(tokens: Float[Array, "b tokens channels"], shape: Shape) -> Float[Array, "b d"]:
    """The inverse of `to_patches`."""
    height, width, maps = shape
    h, w = patch(shape)
    cells = tokens.reshape(-1, height // h, width // w, h, w, maps)
    return cells.swapaxes(2, 3).reshape(len(tokens), -1)


def count_params(network: Velocity) -> int:
    """How many parameters a network has."""
    x = jax.ShapeDtypeStruct((1, network.tokens, network.channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    return sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0), x, t))
    )
