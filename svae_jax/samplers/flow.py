"""Flow matching: an ordinary differential equation from a Gaussian to the posteriors' means."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Float64, Int, PRNGKeyArray, PyTree
from optax import contrib

from svae_jax import seeds
from svae_jax.devices import compiler, sharding
from svae_jax.samplers import base, velocity
from svae_jax.samplers.aggregate import Moments, Posteriors
from svae_jax.samplers.base import Keys

_MUON = 20.0  # learning rate of matrices, whose updates Muon makes orthogonal, over that of Adam


class FlowState(NamedTuple):
    """Everything that fitting changes.

    Attributes:
        step: training steps so far.
        params: the network's.
        opt_state: the optimizer's state.
        ema: the moving average of `params`.
        loss: the sum of the losses since the last log.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    loss: Float[Array, ""]


class FlowConstants(NamedTuple):
    """What fitting is given and does not change.

    Attributes:
        mean: of the means, ``[d]``.
        scale: their standard deviation in each entry, ``[d]``; x = (m − mean) / scale.
        factor: a Cholesky factor of the covariance of x, ``[d, d]``: the source is N(0, F Fᵀ).
        noise: factors of the posteriors' mean noise, ``[n, hw, hw]``.
    """

    mean: Float32[Array | np.ndarray, " d"]
    scale: Float32[Array | np.ndarray, " d"]
    factor: Float32[Array | np.ndarray, "d d"]
    noise: Float32[Array | np.ndarray, "n hw hw"]


class Fit(NamedTuple):
    """The state of a fit.

    Attributes:
        state: what changes.
        fixed: what does not.
    """

    state: FlowState
    fixed: FlowConstants


@dataclass(frozen=True)
class Flow:
    """A rectified flow (Liu et al. 2023; Lipman et al. 2023) to the posteriors' means m.

    With entries standardised, x₀ ~ N(0, covariance of x₁) is the *source*, x₁ the mean of a
    training image, x_t = (1 − t)·x₀ + t·x₁, and a network learns what the best linear velocity
    lacks of E[x₁ − x₀ | x_t]. A sample follows dx/dt = v(x, t) from t=0 to 1. The network's output
    starts at zero, where x(1) = x₀: a sampler that has learned nothing is the Gaussian of the
    means. The means are learned rather than z, as they have little intrinsic dimension; the
    posteriors' noise is Gaussian already, and `noise` adds it.

    Attributes:
        shape: height, width and maps of a latent.
        width: features of a token.
        depth: blocks of the transformer.
        num_params: parameters of the network, the same for latents of all shapes.
        num_steps: training steps of the fit.
        batch_size: images a training step.
        learning_rate: of Adam, at its peak; it decays to 0 along a cosine. Matrices are trained by
            Muon (Jordan et al. 2024), with 20 times this rate.
        ema_decay: of the moving average of the parameters that samples are drawn with.
        ode_steps: steps of Heun's method, of two evaluations each.
        noise: whether samples receive the posteriors' mean noise, as z ~ q(z) does.
        seed: the root of all randomness of the fit.
    """

    shape: base.Shape
    width: int = 192
    depth: int = 3
    num_params: int = 2_000_000
    num_steps: int = 2500
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    ode_steps: int = 12
    noise: bool = False
    seed: int = 0

    options: ClassVar[tuple[str, ...]] = ("noise", "ode_steps")
    version: ClassVar[int] = 3  # of what a fit of the same settings is

    def __post_init__(self) -> None:
        """Checks the settings."""
        for field in ("width", "depth", "num_params", "num_steps", "batch_size"):
            value = getattr(self, field)
            base.require(field, value, value >= 1, "at least 1")
        seeds.check(self.seed)
        rate, decay = self.learning_rate, self.ema_decay
        base.require("learning_rate", rate, 0 < rate < math.inf, "above 0 and finite")
        base.require("ema_decay", decay, 0 <= decay < 1, "0 or above, below 1")

    def check_shape(self) -> None:
        """Raises ValueError above 8,192 latents, or where the network cannot be built."""
        base.check_latents(self.shape)
        _ = self.network

    @property
    def network(self) -> velocity.Velocity:
        """The network of the velocity."""
        return velocity.make(
            self.shape, width=self.width, depth=self.depth, num_params=self.num_params
        )

    def _fixed(self, moments: Moments) -> FlowConstants:
        """What fitting is given and does not change, from the posteriors' moments."""
        covariance = self._covariance(moments)
        variances = np.diag(covariance)
        # An entry that never changes is left as it is.
        scale = np.sqrt(np.where(variances > 0, variances, 1.0))
        correlation = covariance / scale / scale[:, None]
        return FlowConstants(
            mean=moments.mean.astype(np.float32),
            scale=scale.astype(np.float32),
            factor=base.cholesky(correlation).astype(np.float32),
            noise=base.noise_factor(moments.of_noise),
        )

    def init(self, posteriors: Posteriors) -> Fit:
        """The state before the first step."""
        _ = self._points(posteriors)  # asked for first, as `step` needs them
        fixed = jax.tree.map(jnp.asarray, self._fixed(posteriors.moments))
        return Fit(self._init(), fixed)

    def _points(self, posteriors: Posteriors) -> Float32[np.ndarray, "num d"]:
        """What the flow leads to."""
        return posteriors.means

    def _covariance(self, moments: Moments) -> Float64[np.ndarray, "d d"]:
        """The covariance of the points."""
        return moments.of_means

    def _init(self) -> FlowState:
        x = velocity.to_patches(jnp.zeros((1, math.prod(self.shape))), self.shape)
        params = self.network.init(jax.random.fold_in(self._key, 0), x, jnp.zeros(1))
        return FlowState(
            step=jnp.int32(0),
            params=params,
            opt_state=self._optimizer.init(params),
            # A copy: the state is donated, and a buffer cannot be donated twice.
            ema=jax.tree.map(jnp.copy, params),
            loss=jnp.float32(0.0),
        )

    def step(self, state: Fit, posteriors: Posteriors, count: int) -> Fit:
        """Makes `count` training steps on all devices of this process, in one compiled loop.

        Another count compiles nothing anew. The arrays of `state.state` are donated.
        """
        mesh = sharding.make_mesh(jax.local_devices())
        data = standardise(state.fixed, self._points(posteriors))
        state, data = jax.device_put((state, data), sharding.replicated(mesh))
        return state._replace(
            state=_train(self, mesh, state.state, state.fixed, data, jnp.int32(count))
        )

    def logged(self, state: Fit, count: int) -> tuple[dict[str, float], Fit]:
        """The mean loss of the last `count` steps, and a state that sums it anew."""
        loss = float(state.state.loss) / count
        return {"loss": loss}, Fit(state.state._replace(loss=jnp.float32(0.0)), state.fixed)

    def params(self, state: Fit) -> dict[str, PyTree]:
        """The arrays for `sample`."""
        return {**state.fixed._asdict(), "network": state.state.ema}

    def sample(self, params: dict[str, PyTree], keys: Keys) -> Float[Array, "count h w n"]:
        """Draws one latent for each key, by Heun's method."""
        keys = jax.vmap(jax.random.split)(keys)
        white = base.normal(keys[:, 0], params["mean"].shape)
        source = velocity.to_patches(_product(white, params["factor"]), self.shape)
        x = heun(
            lambda x, t: self._velocity(params["network"], x, jnp.full(len(x), t)),
            source,
            self.ode_steps,
        )
        z = params["mean"] + params["scale"] * velocity.from_patches(x, self.shape)
        z = z.reshape(-1, *self.shape)
        if self.noise:
            z = z + base.posterior_noise(params["noise"], keys[:, 1], self.shape)
        return z

    def loss(
        self,
        params: PyTree,
        key: PRNGKeyArray,
        fixed: FlowConstants,
        data: Float[Array, "num d"],
        mesh: Mesh | None = None,
    ) -> Float[Array, ""]:
        """The mean squared error of the velocity on a batch of pairs and times.

        The batch is split over the devices of the mesh, if there is one.
        """
        row_key, noise_key, time_key = jax.random.split(key, 3)
        rows = jax.random.randint(row_key, (self.batch_size,), 0, len(data))
        target = velocity.to_patches(data[rows], self.shape)
        white = jax.random.normal(noise_key, (self.batch_size, data.shape[1]))
        source = velocity.to_patches(_product(white, fixed.factor), self.shape)
        t = jax.random.uniform(time_key, (self.batch_size,))
        if mesh is not None:
            pairs = (target, source, t)
            target, source, t = lax.with_sharding_constraint(pairs, sharding.split_batch(mesh))
        time = t[:, None, None]
        predicted = self._velocity(params, (1 - time) * source + time * target, t)
        return jnp.mean((predicted - (target - source)) ** 2)

    def _velocity(
        self, params: PyTree, x: Float[Array, "b tokens channels"], t: Float[Array, " b"]
    ) -> Float[Array, "b tokens channels"]:
        """The velocity of two Gaussians of equal covariance, and the network's part.

        With s = t² + (1 − t)², x_t has s times that covariance, the best linear velocity is
        (2t − 1)/s · x_t, and what is left of x₁ − x₀ has 1/s of it: so input and output of the
        network have variance 1 (as in EDM, Karras et al. 2022).
        """
        time = t[:, None, None]
        square = time**2 + (1 - time) ** 2
        rest: Any = self.network.apply(params, x / jnp.sqrt(square), t)
        return (2 * time - 1) / square * x + rest / jnp.sqrt(square)

    @property
    def _key(self) -> PRNGKeyArray:
        return seeds.key(self.seed)

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        warmup = min(100, self.num_steps // 10)

        def schedule(peak: float) -> optax.Schedule:
            start = 0.0 if warmup else peak
            return optax.warmup_cosine_decay_schedule(start, peak, warmup, self.num_steps)

        optimizer = contrib.muon(
            schedule(_MUON * self.learning_rate),
            adam_b2=0.99,
            adam_learning_rate=schedule(self.learning_rate),
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


@dataclass(frozen=True)
class LatentFlow(Flow):
    """A `Flow` to samples z ~ q(z|x), one an image, so that it has a density of latents.

    Attributes:
        density_steps: steps of Heun's method for the density.
    """

    noise: bool = dataclasses.field(default=False, init=False)  # z has its noise
    density_steps: int = 20

    options: ClassVar[tuple[str, ...]] = ("ode_steps", "density_steps")
    exact: ClassVar[bool] = False

    def _points(self, posteriors: Posteriors) -> Float32[np.ndarray, "num d"]:
        return posteriors.latents

    def _covariance(self, moments: Moments) -> Float64[np.ndarray, "d d"]:
        return moments.covariance

    def density(self, params: dict[str, PyTree]) -> dict[str, PyTree]:
        """The arrays for `log_prob`: those for `sample`, and of the source what whitens it."""
        factor = np.asarray(params["factor"])
        log_scale = np.sum(np.log(np.asarray(params["scale"], np.float64)))
        return {
            **params,
            "whitening": base.inverse(factor).astype(np.float32),
            "log_det": np.asarray(base.log_det(factor) + log_scale, np.float32),
        }

    def log_prob(
        self, arrays: dict[str, PyTree], z: Float[Array, "*batch h w n"]
    ) -> Float[Array, "*batch"]:
        """An unbiased estimate of log p(z) in nats, a function of z alone.

        d log p/dt along a path is minus the divergence of the velocity (Chen et al. 2018), which a
        random direction of signs estimates (Hutchinson 1990; Grathwohl et al. 2019).
        """
        flat = z.reshape(-1, math.prod(self.shape))
        x = velocity.to_patches((flat - arrays["mean"]) / arrays["scale"], self.shape)
        # Each latent has signs of its own, or the errors of a batch would not average out.
        bits = lax.bitcast_convert_type(jnp.sum(flat, axis=1, dtype=jnp.float32), jnp.int32)
        keys = base.image_keys(jax.random.fold_in(self._key, 1), bits)
        signs = jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(keys)

        def field(state: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
            def moving(x: Array) -> Array:
                return self._velocity(arrays["network"], x, jnp.full(len(x), t))

            v, change = jax.jvp(moving, (state[0],), (signs,))
            return v, jnp.sum(signs * change, axis=(1, 2))

        start = (x, jnp.zeros(len(x)))
        source, divergence = heun(field, start, self.density_steps, backward=True)
        white = _product(velocity.from_patches(source, self.shape), arrays["whitening"])
        log_p = base.normal_log_prob(white) - arrays["log_det"] + divergence
        return log_p.reshape(z.shape[:-3])


@functools.partial(compiler.jit, static_argnums=(0, 1), donate_argnums=2)
def _train(
    flow: Flow,
    mesh: Mesh,
    state: FlowState,
    fixed: FlowConstants,
    data: Float[Array, "num d"],
    num_steps: Array,
) -> FlowState:
    def update(_: Array, state: FlowState) -> FlowState:
        # Keys 1, 2, … are those of the steps; 0 is that of the initialisation.
        key = jax.random.fold_in(flow._key, state.step + 1)
        loss, gradients = jax.value_and_grad(flow.loss)(state.params, key, fixed, data, mesh)
        updates, opt_state = flow._optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The decay grows from 0.1, so that the average forgets the random initialisation.
        decay = jnp.minimum(flow.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        return FlowState(state.step + 1, params, opt_state, ema, state.loss + loss)

    return lax.fori_loop(0, num_steps, update, state)


def standardise(
    fixed: FlowConstants, points: Float32[np.ndarray, "num d"]
) -> Float32[np.ndarray, "num d"]:
    """The points with each entry's mean at 0 and its variance at 1."""
    return (points - np.asarray(fixed.mean)) / np.asarray(fixed.scale)


State = TypeVar("State", bound=PyTree[Float[Array, "..."]])


def heun(
    field: Callable[[State, Array], State], x: State, num_steps: int, *, backward: bool = False
) -> State:
    """Solves dx/dt = field(x, t) from t=0 to 1 with Heun's method, of second order.

    Args:
        field: x and t -> dx/dt.
        x: arrays at t=0.
        num_steps: steps, of two evaluations each.
        backward: from t=1 to 0; x is at t=1.
    """
    begin, size = (1.0, -1.0 / num_steps) if backward else (0.0, 1.0 / num_steps)

    def step(i: Array, x: State) -> State:
        start = field(x, begin + i * size)
        ahead = jax.tree.map(lambda x, v: x + size * v, x, start)
        end = field(ahead, begin + (i + 1) * size)
        return jax.tree.map(lambda x, v, w: x + 0.5 * size * (v + w), x, start, end)

    return lax.fori_loop(0, num_steps, step, x)


def _product(
    white: Float[Array, "b d"], factor: Float[Array | np.ndarray, "d d"]
) -> Float[Array, "b d"]:
    """Each row times Fᵀ."""
    return jnp.dot(white, factor.T, precision=lax.Precision.HIGHEST)
