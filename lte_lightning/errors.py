"""The one kind of error that is meant for the user."""


class UserError(ValueError):
    """Something the user can put right; its message says what was wrong and what to do.

    The command line prints the message alone and ends with exit code 1; from Python it is a `ValueError`.
    """
