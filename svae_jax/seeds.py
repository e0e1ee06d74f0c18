"""Seeds of random numbers: their range, and the keys that they give."""

import operator
from typing import TYPE_CHECKING, Any

from svae_jax.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray

LARGEST = 2**32 - 1
"""The largest seed that a key of JAX takes whole."""


def check(seed: Any) -> None:
    """Checks a seed.

    Args:
        seed: an integer, of Python or NumPy.

    Raises:
        UserError: it is none, or out of range.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number <= LARGEST:
        raise UserError(f"seed must be an integer from 0 to 2^32 - 1, got {seed!r}")


def key(seed: Any) -> "PRNGKeyArray":
    """The root key of a seed.

    Raises:
        UserError: as `check`.
    """
    import jax  # late, so that --help answers at once

    check(seed)
    return jax.random.key(operator.index(seed))
