"""The model: encoder, posterior, prior, decoder and likelihood as one Flax module."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from svae_jax import latents
from svae_jax.latents.means import FreeMean
from svae_jax.likelihoods import Likelihood
from svae_jax.likelihoods.gaussian import Gaussian
from svae_jax.model import networks, stacks
from svae_jax.model.layers import Style
from svae_jax.model.linear import PCA, LinearPath, patch_for
from svae_jax.pixels import PixelRange

NONE = "none"  # in place of a stack: no network, but what the linear path makes
HEADS = ("dense", "convolutional")
LINEAR_SHARE = 0.1  # the most weights of the linear path, as a share of the decoder's


class Outputs(NamedTuple):
    """The model's outputs for a batch of images.

    Attributes:
        outputs: of the decoder; `likelihood.mean` gives the images.
        params: the arrays of the posteriors, by name.
        z: one sample of each posterior.
        kl_per_map: KL(q(z|x) ‖ p(z)) in nats, by map.
    """

    outputs: Float[Array, "b h w k"]
    params: latents.Params
    z: Float[Array, "b _h _w n"]
    kl_per_map: Float[Array, "b n"]


class SpatialVAE(nn.Module):
    """A variational auto-encoder whose latent is a stack of feature maps.

    Attributes:
        posterior: the family of q(z|x).
        encoder: any module that maps (images [b, h, w, c], train) to [b, posterior.num_params].
        decoder: any module that maps (z [b, h, w, n], train) to what the likelihood takes,
            [b, h, w, likelihood.num_outputs]: for most, means of pixels in [-1, 1].
        prior: p(z), by default the standard normal. A learned one has its parameters in `prior`.
        likelihood: p(x|z). A learned scale is the parameter `log_sigma`, starting at 0. Training
            and evaluation set it from the configuration.
        linear: the linear path beside encoder and decoder, if any; it adds to the posterior's mean
            and to the decoder's outputs.

    Raises:
        ValueError: a linear path of other sizes than the posterior.
    """

    posterior: latents.Posterior
    encoder: nn.Module
    decoder: nn.Module
    prior: latents.Prior = None  # type: ignore[assignment]  # then it is set below
    likelihood: Likelihood | None = None
    linear: LinearPath | None = None

    def __post_init__(self):
        """Puts the standard normal in the place of a prior that is not given; checks the path."""
        q, path = self.posterior, self.linear
        if path is not None and not _same_sizes(path, q):
            raise ValueError(
                f"linear must have the posterior's {q.height}x{q.width} cells and {q.maps} maps, "
                f"got {path.height}x{path.width} and {path.maps}"
            )
        if self.prior is None:
            self.prior = latents.make_prior("standard", height=q.height, width=q.width, maps=q.maps)
        super().__post_init__()

    def setup(self):
        """Creates the parameters of the prior and of the likelihood, where they have any."""
        self.prior_params = {}
        if self.prior.shapes:
            self.prior_params = self.param("prior", lambda key: self.prior.initial())
        if self.likelihood is not None and self.likelihood.learns_scale:
            shape = self.likelihood.scale_shape
            self.log_sigma = self.param("log_sigma", nn.initializers.zeros_init(), shape)

    def encode(self, images: Float[Array, "b h w c"], train: bool = False) -> latents.Params:
        """The posteriors of images in [-1, 1], as named arrays."""
        params = self.posterior.unpack(self.encoder(images, train))
        if self.linear is None:
            return params
        return self.posterior.shifted(params, self.linear.encode(images))

    def decode(self, z: Float[Array, "b h w n"], train: bool = False) -> Float[Array, "b _h _w k"]:
        """The decoder's outputs: for most likelihoods the means of the pixels.

        -1 and 1 are black and white; a linear path may lead beyond.
        """
        outputs = self.decoder(z, train)
        return outputs if self.linear is None else outputs + self.linear.decode(z)

    def images(self, z: Float[Array, "b h w n"]) -> Float[Array, "b _h _w c"]:
        """The images E[x|z], as `decode` gives them, not clipped."""
        outputs = self.decode(z)
        return outputs if self.likelihood is None else self.likelihood.mean(outputs)

    def __call__(
        self, key: PRNGKeyArray, images: Float[Array, "b h w c"], train: bool = False
    ) -> Outputs:
        """Encodes, draws one sample of each posterior, and decodes."""
        params = self.encode(images, train)
        z = self.posterior.sample(key, params)
        return Outputs(self.decode(z, train), params, z, self.kl_per_map(params))

    def kl_per_map(self, params: latents.Params) -> Float[Array, "*b n"]:
        """KL(q(z|x) ‖ p(z)) in nats of each map, for posteriors of these arrays."""
        return self.prior.kl_per_map(self.posterior, params, dict(self.prior_params))

    def kl_per_location(self, params: latents.Params) -> Float[Array, "*b h w"]:
        """KL(q(z|x) ‖ p(z)) in nats of each location (see `latents.Prior.kl_per_location`)."""
        return self.prior.kl_per_location(self.posterior, params, dict(self.prior_params))

    def log_prior(self, z: Float[Array, "*b h w n"]) -> Float[Array, "*b"]:
        """log p(z) in nats."""
        return self.prior.log_prob(dict(self.prior_params), z)

    @property
    def pixels(self) -> PixelRange:
        """What the values of the images' pixels mean; 8 bits where there is no likelihood yet."""
        return PixelRange() if self.likelihood is None else self.likelihood.pixels

    @property
    def num_latents(self) -> int:
        """Z, the number of latents of an image."""
        return math.prod(self.posterior.shape)

    def sample_prior(
        self, key: PRNGKeyArray, count: int, variables: dict | None = None
    ) -> Float[Array, "{count} h w n"]:
        """Draws latents of `count` images from the prior.

        Args:
            key: random key.
            count: number of images.
            variables: the model's variables; only a learned prior needs them.

        Raises:
            ValueError: the prior is learned, and there are no variables.
        """
        if not self.prior.shapes:
            return self.prior.sample(key, {}, (count,))
        if variables is None:
            raise ValueError(
                "the prior is learned: give the variables, sample_prior(key, count, variables)"
            )
        return self.prior.sample(key, variables["params"]["prior"], (count,))


def make(
    posterior: latents.Posterior,
    likelihood: Likelihood,
    *,
    prior: latents.Prior,
    encoder: str,
    decoder: str,
    style: Style,
    head: str = "dense",
    parity_maps: int = 0,
    has_linear_path: bool = False,
) -> SpatialVAE:
    """Builds a model from the texts of its two stacks (see `stacks`).

    Args:
        posterior: the family of q(z|x).
        likelihood: p(x|z), which knows the images' shape.
        prior: p(z).
        encoder: stack of convolutions.
        decoder: stack of transposed convolutions.
        style: of all layers.
        head: of the encoder, see `networks.Encoder`.
        parity_maps: for a `vector` posterior, the number of maps of the spatial latents whose
            decoder is to have as many parameters as this one; 0 for all others.
        has_linear_path: whether there is a linear path beside the networks. Its patches are as
            large as a tenth of the decoder's weights allows, and the decoder's first layer is
            narrowed, so that both together are as large as the stack alone. Without a decoder,
            the patches tile the image, with up to `linear.MAX_DIMS` values each.

    Raises:
        ValueError: a stack that does not fit the image or the latent; the message begins with
            `encoder`, `decoder`, `head`, `parity_maps` or `linear`.
    """
    is_vector = latents.is_vector(posterior.name)
    if is_vector != (parity_maps >= 1):
        needed = "at least 1 for" if is_vector else "0 for all but"
        raise ValueError(f"parity_maps must be {needed} the vector posterior, got {parity_maps}")
    if (encoder == NONE) != (decoder == NONE) or (decoder == NONE and not has_linear_path):
        raise ValueError(
            f"encoder: {NONE!r} goes with decoder={NONE!r} and with a linear path, got "
            f"decoder={decoder!r}"
        )
    if decoder == NONE:
        none = networks.Constant(posterior), networks.Zero(likelihood)
        path = _linear_path(posterior, likelihood, None)
        return SpatialVAE(posterior, *none, prior, likelihood, path)
    size = likelihood.image_shape[:2]
    image: dict[str, Any] = {"image_size": size, "num_outputs": likelihood.num_outputs}
    cells = (posterior.height, posterior.width)
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    try:
        encoder_layers = stacks.parse(encoder)
        left = tuple(stacks.encoder_size(encoder_layers, side) for side in size)
    except ValueError as error:
        raise ValueError(f"encoder: {error}") from None
    if head == "convolutional" and (left[0] < cells[0] or left[1] < cells[1]):
        raise ValueError(
            f"encoder: {encoder!r} leaves {left[0]}x{left[1]} features of the image, and a "
            f"convolutional head needs {cells[0]}x{cells[1]}, one a latent cell; take fewer strides"
        )
    try:
        if is_vector:
            decoder_layers = stacks.vector_decoder_layers(
                decoder, maps=posterior.maps, parity_maps=parity_maps, style=style, **image
            )
        else:
            decoder_layers = stacks.decoder_layers(
                decoder, height=cells[0], width=cells[1], **image
            )
    except ValueError as error:
        raise ValueError(f"decoder: {error}") from None
    linear = None
    if has_linear_path:
        total = stacks.num_decoder_params(decoder_layers, posterior.maps, style)
        linear = _linear_path(posterior, likelihood, total)
        rest = total - linear.num_decoder_params
        decoder_layers = stacks.fitted_width(decoder_layers, posterior.maps, style, rest)
    return SpatialVAE(
        posterior,
        networks.Encoder(encoder_layers, posterior, style, head),
        networks.Decoder(decoder_layers, likelihood, style),
        prior,
        likelihood,
        linear,
    )


def _linear_path(
    posterior: latents.Posterior, likelihood: Likelihood, decoder_size: int | None
) -> LinearPath:
    """The linear path for a decoder of so many parameters; None: for no decoder."""
    shape = likelihood.image_shape
    check_takes_path(likelihood)
    height, width, maps = posterior.height, posterior.width, posterior.maps
    most = LINEAR_SHARE * decoder_size if decoder_size else math.inf
    try:
        patch = patch_for(shape, height, width, maps, most)
    except ValueError as error:
        raise ValueError(f"linear: {error}") from None
    return LinearPath(shape, height, width, maps, patch)


def check_takes_path(likelihood: Likelihood) -> None:
    """Checks that a linear path may add to the outputs that a likelihood takes.

    Raises:
        ValueError: the outputs are not means of the image's channels.
    """
    if not likelihood.emits_means or likelihood.num_outputs != likelihood.image_shape[2]:
        raise ValueError(
            f"linear: the outputs of {type(likelihood).__name__} are not means of pixels, to which "
            "a linear path could add; take linear='none' or another likelihood"
        )


def check_can_start_at_pca(model: SpatialVAE) -> None:
    """Checks that `start_at_pca` knows the parts of a model.

    Raises:
        ValueError: an encoder, a decoder or a covariance of another kind.
    """
    kinds = {
        "encoder": (networks.Encoder, networks.Constant),
        "decoder": (networks.Decoder, networks.Zero),
    }
    for name, known in kinds.items():
        if not isinstance(part := getattr(model, name), known):
            raise ValueError(
                f"linear: only the package's own networks can start at PCA, and the {name} is a "
                f"{type(part).__name__}; take linear='random'"
            )
    covariance = model.posterior.covariance_model
    if not hasattr(covariance, "of_log_variance"):
        raise ValueError(
            f"linear: a {type(covariance).__name__} cannot start at PCA without a method "
            "of_log_variance; add it, or take linear='random'"
        )


def is_exact_at_pca(model: SpatialVAE) -> bool:
    """Whether `start_at_pca` gives probabilistic PCA itself, with its exact posterior.

    Then σ is PCA's, and with the standard prior log p(x) is known in closed form. Else, the
    posterior or the noise is of another kind, or patches are those of a smaller image.
    """
    return (
        model.linear is not None
        and model.linear.tiles
        and isinstance(model.posterior.mean_model, FreeMean)
        and isinstance(model.likelihood, Gaussian)
    )


def start_at_pca(model: SpatialVAE, params: PyTree, pca: PCA) -> PyTree:
    """The parameters with which the model is probabilistic PCA.

    The linear path takes A, a, B and b; the last layers of encoder and decoder start at zero, but
    for the bias that gives the posterior's variances. A learned σ starts at PCA's.

    Args:
        model: with a linear path, and networks of `networks`.
        params: the initial parameters.
        pca: from `linear.pca`.

    Raises:
        ValueError: an encoder, a decoder or a covariance of another kind.
    """
    check_can_start_at_pca(model)
    scale = model.posterior.output_scale
    log_variances = jnp.log(jnp.asarray(pca.variances, jnp.float32))
    bias = model.posterior.bias_of(jax.random.key(0), log_variances) / scale
    encoder: dict[str, Any] = dict(params["encoder"])
    decoder: dict[str, Any] = dict(params.get("decoder", {}))
    if isinstance(model.encoder, networks.Constant):
        encoder["bias"] = bias
    else:
        last = "Dense_0" if "Dense_0" in encoder else "Head_0"
        encoder[last] = jax.tree.map(jnp.zeros_like, encoder[last]) | {"bias": bias}
        decoder["Convolution_0"] = jax.tree.map(jnp.zeros_like, decoder["Convolution_0"])
    path = {
        name: jnp.asarray(getattr(pca, name), jnp.float32)
        for name in ("to_mean", "mean_bias", "to_patch", "patch_bias")
    }
    start: dict[str, Any] = {"encoder": encoder, "linear": path} | (
        {"decoder": decoder} if decoder else {}
    )
    if "log_sigma" in params:
        assert model.likelihood is not None  # it has the scale
        sigma = pca.sigma / model.likelihood.unit_stddev
        start["log_sigma"] = jnp.full_like(params["log_sigma"], math.log(sigma))
    return params | start


def _same_sizes(path: LinearPath, posterior: latents.Posterior) -> bool:
    return all(getattr(path, s) == getattr(posterior, s) for s in ("height", "width", "maps"))


def num_params(params: PyTree) -> dict[str, int]:
    """The numbers of parameters of encoder and decoder, linear path included, and of the prior."""
    path = params.get("linear", {})
    parts = {
        "encoder": [params["encoder"], path.get("to_mean", ()), path.get("mean_bias", ())],
        "decoder": [
            params.get("decoder", {}),
            path.get("to_patch", ()),
            path.get("patch_bias", ()),
        ],
    }
    if "prior" in params:
        parts["prior"] = [params["prior"]]
    return {name: networks.num_params(part) for name, part in parts.items()}


def with_lax_convolutions(model: SpatialVAE) -> SpatialVAE:
    """The model with XLA's own convolutions, through which `jax.jvp` passes; same variables.

    A network of the user's own stays as it is, unless it has the field `style` of the package's.
    """
    parts = {name: getattr(model, name) for name in ("encoder", "decoder")}
    styled = {name: p for name, p in parts.items() if isinstance(getattr(p, "style", None), Style)}
    return model.clone(
        **{
            name: part.clone(style=dataclasses.replace(part.style, convolutions="lax"))
            for name, part in styled.items()
        }
    )


def encode(model: SpatialVAE, variables: PyTree, pixels: Num[Array, "b h w c"]) -> latents.Params:
    """The posteriors of images in the units of the data, as named arrays."""
    params: Any = model.apply(variables, model.pixels.to_float(pixels), method="encode")
    return params


def init(model: SpatialVAE, key: PRNGKeyArray, image_shape: tuple[int, int, int]) -> dict:
    """Draws the model's variables: `params` and, with batch norm, `batch_stats`."""
    images = jnp.zeros((1, *image_shape))
    variables = model.init(key, jax.random.key(0), images, train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
