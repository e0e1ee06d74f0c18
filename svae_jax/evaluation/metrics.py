"""Evaluation metrics, accumulated inside jit."""

import functools

from clu import metrics


@functools.cache
def averages(*names: str) -> type[metrics.Collection]:
    """A collection that averages each of these outputs over examples.

    Its `single_from_model_output(elbo=…, …, mask=…)` takes arrays `[b]`. Examples whose mask is 0
    or False (those that pad the last batch) count for nothing, even if they are NaN.

    Cached, so that the same names give the same type, which jit compiles for once.
    """
    return metrics.Collection.create(**{n: metrics.Average.from_output(n) for n in names})
