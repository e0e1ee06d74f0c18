"""Seeds: one range and one message, wherever a seed is given."""

import jax
import numpy as np
import pytest

from svae_jax import seeds

BAD = [-1, 2**32, 10**30, 1.0, "0", None, True, np.float32(1)]


@pytest.mark.parametrize("seed", BAD, ids=repr)
def test_what_is_no_seed_is_one_line(seed):
    with pytest.raises(ValueError, match=r"^seed must be an integer from 0 to 2\^32 - 1, got "):
        seeds.key(seed)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, np.uint32(7), np.int64(2**32 - 1)])
def test_the_key_of_a_seed_is_that_of_jax(seed):
    found, wanted = (jax.random.key_data(key) for key in (seeds.key(seed), jax.random.key(seed)))
    np.testing.assert_array_equal(found, wanted)
