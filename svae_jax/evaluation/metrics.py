"""Evaluation metrics, accumulated inside jit."""

import flax
from clu import metrics


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Averages over held-out images, in nats an image.

    `EvalMetrics.single_from_model_output(elbo=…, …, mask=…)`, each `[b]`; examples whose mask
    is 0 or False (those that pad the last batch) count for nothing, even where they are NaN.
    """

    elbo: metrics.Average.from_output("elbo")  # type: ignore[valid-type]
    elbo_discretized: metrics.Average.from_output("elbo_discretized")  # type: ignore[valid-type]
    reconstruction: metrics.Average.from_output("reconstruction")  # type: ignore[valid-type]
    kl: metrics.Average.from_output("kl")  # type: ignore[valid-type]
    squared_error: metrics.Average.from_output("squared_error")  # type: ignore[valid-type]


@flax.struct.dataclass
class BoundMetrics(metrics.Collection):
    """Averages of importance-weighted bounds over held-out images, in nats an image."""

    density: metrics.Average.from_output("density")  # type: ignore[valid-type]
    discretized: metrics.Average.from_output("discretized")  # type: ignore[valid-type]
