"""Standard errors, against the spread over new samples."""

import jax
import numpy as np
import pytest

from svae_jax.evaluation import estimates

KEY = jax.random.key(0)


def test_a_mean_and_its_standard_error_are_numpys():
    values = np.random.default_rng(0).normal(1e6, 1, 1000).astype(np.float32)
    mean = estimates.of_mean(values)
    assert mean.value == pytest.approx(values.mean(dtype=np.float64), rel=1e-15)
    expected = values.astype(np.float64).std(ddof=1) / np.sqrt(1000)
    assert mean.standard_error == pytest.approx(expected, rel=1e-12)
    assert np.isnan(estimates.of_mean(values[:1]).standard_error)
    assert mean.scaled(-2.0) == (-2 * mean.value, 2 * mean.standard_error)


def test_the_bootstrap_error_is_that_of_a_difference_of_medians():
    rng = np.random.default_rng(0)

    def difference(a, b):
        return float(np.median(a) - np.median(b))

    a, b = rng.normal(0, 1, 400), rng.normal(5, 2, 100)
    estimate = estimates.bootstrap(KEY, difference, a, b, num_replicates=300)
    assert estimate.value == difference(a, b)
    # The median of n Gaussian values has variance πσ²/2n.
    expected = np.sqrt(np.pi / 2 * (1 / 400 + 4 / 100))
    assert estimate.standard_error == pytest.approx(expected, rel=0.3)
    assert estimate == estimates.bootstrap(KEY, difference, a, b, num_replicates=300)
    assert np.isnan(estimates.bootstrap(KEY, difference, a, b, num_replicates=0).standard_error)
