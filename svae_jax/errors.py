"""The error for mistakes that the user can correct."""


class UserError(ValueError):
    """A mistake in what the user asked for, described in one line.

    The line names the field, its value and the cure. `svae_jax.main` prints it without a traceback
    and exits with a non-zero code; any other exception is a bug in this package.
    """
