"""The model: encoder + posterior + decoder as one Flax module."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from svae_jax import latents
from svae_jax.model import networks


class Outputs(NamedTuple):
    """The model's outputs for a batch of images.

    Attributes:
        means: f(z), the means of the pixels, in [-1, 1].
        params: the arrays of the posteriors, by name.
        z: one sample of each posterior.
    """

    means: Float[Array, "b h w c"]
    params: latents.Params
    z: Float[Array, "b _h _w n"]


class SpatialVAE(nn.Module):
    """A variational auto-encoder whose latent is a stack of feature maps.

    Attributes:
        posterior: the family of q(z|x).
        encoder: any module that maps (images [b, h, w, c], train) to [b, posterior.num_params].
        decoder: any module that maps (z [b, h, w, n], train) to images in [-1, 1].
        learns_sigma: whether the likelihood's log σ is a parameter, `log_sigma`, starting at 0.
    """

    posterior: latents.Posterior
    encoder: nn.Module
    decoder: nn.Module
    learns_sigma: bool = False

    def setup(self):
        """Creates log σ where it is learned."""
        if self.learns_sigma:
            self.log_sigma = self.param("log_sigma", nn.initializers.zeros_init(), ())

    def encode(self, images: Float[Array, "b h w c"], train: bool = False) -> latents.Params:
        """The posteriors of images in [-1, 1], as named arrays."""
        return self.posterior.unpack(self.encoder(images, train))

    def decode(self, z: Float[Array, "b h w n"], train: bool = False) -> Float[Array, "b _h _w c"]:
        """The means of the pixels, in [-1, 1]."""
        return self.decoder(z, train)

    def __call__(
        self, key: PRNGKeyArray, images: Float[Array, "b h w c"], train: bool = False
    ) -> Outputs:
        """Encodes, draws one sample of each posterior, and decodes."""
        params = self.encode(images, train)
        z = self.posterior.sample(key, params)
        return Outputs(self.decode(z, train), params, z)

    @property
    def num_latents(self) -> int:
        """Z, the number of latents of an image."""
        return self.posterior.height * self.posterior.width * self.posterior.maps

    def sample_prior(self, key: PRNGKeyArray, count: int) -> Float[Array, "{count} h w n"]:
        """Draws latents of `count` images from the prior."""
        p = self.posterior
        return latents.sample_prior(key, (count,), height=p.height, width=p.width, maps=p.maps)


def make(
    posterior: latents.Posterior,
    *,
    encoder: str,
    decoder: str,
    image_size: int,
    image_channels: int,
    style: networks.Style,
    parity_maps: int = 0,
    learns_sigma: bool = False,
) -> SpatialVAE:
    """Builds a model from the texts of its two stacks (see `networks`).

    Args:
        posterior: the family of q(z|x).
        encoder: stack of convolutions.
        decoder: stack of transposed convolutions.
        image_size: height and width of an image.
        image_channels: channels of an image.
        style: norm, activation and dtype.
        parity_maps: for a `vector` posterior, the number of maps of the spatial latents whose
            decoder is to have as many parameters as this one; 0 for all others.
        learns_sigma: whether log σ is a parameter.

    Raises:
        ValueError: a stack that does not fit the image or the latent; the message begins with
            `encoder`, `decoder` or `parity_maps`.
    """
    is_vector = posterior.name == "vector"
    if is_vector != (parity_maps >= 1):
        needed = "at least 1 for" if is_vector else "0 for all but"
        raise ValueError(f"parity_maps must be {needed} the vector posterior, got {parity_maps}")
    image = {"image_size": image_size, "image_channels": image_channels}
    try:
        encoder_layers = networks.parse(encoder)
        networks.encoder_size(encoder_layers, image_size)
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from None
    try:
        if is_vector:
            decoder_layers = networks.vector_decoder_layers(
                decoder, maps=posterior.maps, parity_maps=parity_maps, style=style, **image
            )
        else:
            decoder_layers = networks.decoder_layers(
                decoder, height=posterior.height, width=posterior.width, **image
            )
    except ValueError as error:
        raise ValueError(f"decoder: {error}") from None
    return SpatialVAE(
        posterior,
        networks.Encoder(encoder_layers, posterior, style),
        networks.Decoder(decoder_layers, style),
        learns_sigma,
    )


def init(model: SpatialVAE, key: PRNGKeyArray, image_size: int, image_channels: int) -> dict:
    """Draws the model's variables: `params` and, with batch norm, `batch_stats`."""
    images = jnp.zeros((1, image_size, image_size, image_channels))
    variables = model.init(key, jax.random.key(0), images, train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
