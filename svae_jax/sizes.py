"""What follows from the images' size: the latent's, the networks' stacks, the encoder's head."""

import ml_collections

from svae_jax import latents
from svae_jax.model import stacks

AUTO = "auto"  # of a stack or a head that follows from the sizes
# From so many pixels or latent cells along a side on, the encoder's head is convolutional: the
# weights of a dense one grow with the square of the number of cells.
_CONVOLUTIONAL_PIXELS, _CONVOLUTIONAL_CELLS = 64, 16

Shape = tuple[int, int, int]


def image_shape(config: ml_collections.ConfigDict) -> Shape:
    """Height, width and channels of a configuration's images; 0 where they are not known yet."""
    return config.dataset.height, config.dataset.width, config.dataset.channels


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The configuration with all that follows from the images' size, where that is known.

    `latent.cell` gives the latent's height and width, and the word `auto` the stacks of encoder and
    decoder and the encoder's head. A configuration without them stays as it is.
    """
    copy = ml_collections.ConfigDict(config.to_dict())
    latent, model, size = copy.latent, copy.model, image_shape(config)[:2]
    if min(size) < 1:
        return copy
    if latent.cell > 0:
        latent.height, latent.width = (-(-pixels // latent.cell) for pixels in size)
    is_vector = latents.is_vector(latent.name)
    cells = (latent.height, latent.width)
    if min(*cells, latent.maps) < 1:
        return copy
    if model.head == AUTO:
        is_large = max(size) >= _CONVOLUTIONAL_PIXELS or max(cells) >= _CONVOLUTIONAL_CELLS
        model.head = "convolutional" if is_large and not is_vector else "dense"
    if model.encoder == AUTO:
        is_dense = model.head == "dense"
        model.encoder = stacks.encoder_for(size, None if is_dense else cells)
    if model.decoder == AUTO:
        start = (stacks.VECTOR_START,) * 2 if is_vector else cells
        model.decoder = stacks.decoder_for(size, start, copy.model.parity_maps or latent.maps)
    return copy
