"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user asked for, told in one line.

    The line names the field, its value and the cure. `svae_jax.main` prints it without a traceback
    and exits with a non-zero code; any other exception is a fault of this package.
    """
