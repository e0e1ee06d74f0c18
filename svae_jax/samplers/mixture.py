"""A mixture of Gaussians over the leading principal components of the posteriors' means."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from svae_jax import seeds
from svae_jax.samplers import base
from svae_jax.samplers.aggregate import Moments, Posteriors
from svae_jax.samplers.base import Keys

_RIDGE = 1e-3  # added to the variances of a component; in whitened space the whole has variance 1
_POINTS = 10  # images of a mixture component for each principal component, at least


@dataclass(frozen=True)
class Mixture(base.ClosedForm):
    """A mixture with full covariances, of as many components as RAE's (Ghosh et al. 2020).

    It models the posteriors' means in the k leading principal components of their covariance,
    whitened. There it is well posed: all scales are 1, and k is at most the number that holds
    `share` of the variance, and at most a tenth of the images of a component of the mixture. In all
    h·w·n dimensions a component's covariance could have more entries than there are images.

    What is left out is drawn too, or samples look washed out: the other principal components are
    uncorrelated with the modelled ones, and drawn from their own Gaussian. Thus the mean and the
    covariance of the means stay those of the data. `noise` adds the posteriors' mean noise.

    Attributes:
        shape: height, width and maps of a latent.
        components: Gaussians of the mixture.
        share: share of the variance of the means that the modelled principal components hold.
        noise: whether samples receive the posteriors' mean noise, as z ~ q(z) does.
        seed: of the initialisation, by k-means.
    """

    shape: base.Shape
    components: int = 10
    share: float = 0.9
    noise: bool = False
    seed: int = 0

    options: ClassVar[tuple[str, ...]] = ("noise",)

    def __post_init__(self) -> None:
        """Checks the settings."""
        base.require("components", self.components, self.components >= 1, "at least 1")
        seeds.check(self.seed)
        base.require("share", self.share, 0 < self.share <= 1, "above 0, at most 1")

    def check_shape(self) -> None:
        """Raises ValueError above 8,192 latents."""
        base.check_latents(self.shape)

    def fit(self, posteriors: Posteriors) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `sample`, by expectation maximisation.

        Raises:
            ValueError: there are fewer images than components.
        """
        # Imported here, as it takes a second.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        means, moments = posteriors.means, posteriors.moments
        if len(means) < self.components:
            raise ValueError(
                f"components must be at most the number of images, {len(means)}, got "
                f"components={self.components}"
            )
        variances, directions = np.linalg.eigh(moments.of_means)
        variances, directions = np.maximum(variances[::-1], 0.0), directions[:, ::-1]
        k = self._dimensions(variances, len(means))
        scales = np.sqrt(variances)
        white = (means - moments.mean) @ directions[:, :k] / scales[:k]
        model = GaussianMixture(self.components, reg_covar=_RIDGE, random_state=self.seed)
        with warnings.catch_warnings():
            # Its 100 iterations are RAE's, whether or not the last one still gains.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = model.fit(white.astype(np.float32))
        return {
            "mean": moments.mean.astype(np.float32),
            "basis": (directions * scales).T.astype(np.float32),
            "log_weights": np.log(fitted.weights_).astype(np.float32),
            "centres": fitted.means_.astype(np.float32),
            "factors": np.linalg.cholesky(fitted.covariances_).astype(np.float32),
            "noise": base.noise_factor(moments.of_noise),
        }

    def _dimensions(self, variances: Float[np.ndarray, " d"], num_images: int) -> int:
        """The number k of principal components that the mixture models."""
        held = np.cumsum(variances) / np.sum(variances)
        wanted = int(np.searchsorted(held, self.share)) + 1
        affordable = num_images // (self.components * _POINTS)
        present = int(np.sum(variances > 1e-10 * variances[0]))
        return max(1, min(wanted, affordable, present))

    def sample(
        self, params: dict[str, Float[Array, "..."]], keys: Keys
    ) -> Float[Array, "count h w n"]:
        """Draws one latent for each key."""
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        chosen = jax.vmap(lambda key: jax.random.categorical(key, params["log_weights"]))(
            keys[:, 0]
        )
        white = base.normal(keys[:, 1], params["mean"].shape)
        k = params["centres"].shape[1]
        high = lax.Precision.HIGHEST
        leading = params["centres"][chosen] + jnp.einsum(
            "bij,bj->bi", params["factors"][chosen], white[:, :k], precision=high
        )
        coordinates = jnp.concatenate([leading, white[:, k:]], axis=1)
        z = params["mean"] + jnp.dot(coordinates, params["basis"], precision=high)
        z = z.reshape(-1, *self.shape)
        if self.noise:
            z = z + base.posterior_noise(params["noise"], keys[:, 2], self.shape)
        return z

    def density(
        self, params: dict[str, Float[np.ndarray, "..."]]
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """The arrays for `log_prob`, of the means and the posteriors' mean noise.

        With the covariance C = L·Lᵀ of z over all components, component c has that of
        C + U·(S_c − I)·Uᵀ, where the k columns of U are the modelled principal components. With
        L⁻¹·U = Q·R, y = Qᵀ·L⁻¹·(z − mean) has N(R·m_c, I + R·(S_c − I)·Rᵀ) in its first k entries
        and N(0, I) in the others, for all components.
        """
        given = {name: np.asarray(value, np.float64) for name, value in params.items()}
        k = given["centres"].shape[1]
        of_noise = given["noise"] @ given["noise"].swapaxes(1, 2)
        of_means = given["basis"].T @ given["basis"]
        factor = base.cholesky(Moments(given["mean"], of_means, of_noise).covariance)
        whitening = base.inverse(factor)
        q, r = np.linalg.qr(whitening @ given["basis"][:k].T, mode="complete")
        r = r[:k]
        of_component = given["factors"] @ given["factors"].swapaxes(1, 2)
        covariances = np.eye(k) + r @ (of_component - np.eye(k)) @ r.T
        factors = np.stack([base.cholesky(covariance) for covariance in covariances])
        arrays = {
            "mean": given["mean"],
            "whitening": q.T @ whitening,
            "log_weights": given["log_weights"],
            "centres": given["centres"] @ r.T,
            "whitenings": np.stack([base.inverse(f) for f in factors]),
            "log_dets": base.log_det(factor) + base.log_det(factors),
        }
        return {name: value.astype(np.float32) for name, value in arrays.items()}

    def log_prob(
        self, arrays: dict[str, Float[Array, "..."]], z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch"]:
        """log p(z) in nats, of z with the posteriors' mean noise, whatever `noise` says."""
        high = lax.Precision.HIGHEST
        centred = z.reshape(*z.shape[:-3], -1) - arrays["mean"]
        y = jnp.dot(centred, arrays["whitening"].T, precision=high)
        k = arrays["centres"].shape[1]
        leading = y[..., None, :k] - arrays["centres"]
        white = jnp.einsum("cij,...cj->...ci", arrays["whitenings"], leading, precision=high)
        of_component = base.normal_log_prob(white) - arrays["log_dets"] + arrays["log_weights"]
        return base.normal_log_prob(y[..., k:]) + logsumexp(of_component, axis=-1)
