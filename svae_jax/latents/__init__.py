"""Posteriors and priors over latent feature maps: pure functions of their parameters.

A latent is N feature maps of h×w, held as ``[*batch, h, w, n]``. A posterior is how its mean is
built (`means`) times how its covariance is built (`covariances`); the models of the paper (Wang,
Yuan, Ji 2017, "Spatial variational auto-encoding via matrix-variate normal distributions") are
rows of one table, which also has the number of parameters a map:

| name           | mean M (per map)   | covariance         | a map           | paper           |
|----------------|--------------------|--------------------|-----------------|-----------------|
| `vector`       | unconstrained, 1×1 | independent        | 2               | Eq. 2           |
| `naive`        | unconstrained      | independent        | 2hw             | §3.2, Eq. 3     |
| `mvn`          | unconstrained      | Ω⊗Ψ, both diagonal | hw + h + w      | §3.3, Eq. 5–6   |
| `lowrank`      | Σ_r μ_r ν_rᵀ       | Ω⊗Ψ, both diagonal | (R+1)(h + w)    | §3.4, Eq. 8–9   |
| `mvn_full`     | unconstrained      | Ω⊗Ψ, both full     | hw + (h² + h + w² + w)/2 | beyond |
| `lowrank_full` | Σ_r μ_r ν_rᵀ       | Ω⊗Ψ, both full     | R(h+w) + (h² + h + w² + w)/2 | beyond |

    post = latents.make("lowrank", height=3, width=3, maps=128)
    params = post.unpack(encoder(images))  # [batch, post.num_params] -> named arrays
    z = post.sample(key, params)  # [batch, 3, 3, 128]
    loss = reconstruction(decoder(z)) + post.kl(params)

A prior is a row of a second table (`priors`): `standard`, N(0, I), which the paper and `post.kl`
have; `tensor_normal`, `matrix_normal` and `autoregressive`, Gaussians that are learned with the
model.

    prior = latents.make_prior("tensor_normal", height=3, width=3, maps=128)
    prior_params = prior.initial()  # named arrays, learned with the decoder
    kl = prior.kl_per_map(post, params, prior_params)  # [batch, 128], nats
    z = prior.sample(key, prior_params, (16,))  # [16, 3, 3, 128]

Two errata of the paper: its Eq. 7 (covariance Ω⊗Ψ of vec Z) holds for the row-major vec, not the
column-stacking one it defines; the subscript `i*j` in its Eq. 4, 6 and 9 means the pair (i, j).
"""

from svae_jax.latents.base import Params, Prior
from svae_jax.latents.posterior import Posterior
from svae_jax.latents.priors import make_prior, prior_names, sample_prior
from svae_jax.latents.table import has_rank, is_vector, make, names

__all__ = [
    "Params",
    "Posterior",
    "Prior",
    "has_rank",
    "is_vector",
    "make",
    "make_prior",
    "names",
    "prior_names",
    "sample_prior",
]
