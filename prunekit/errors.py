"""What a caller got wrong, in one line: what, got, expected, remedy."""


class InputError(ValueError):
    """Bad usage or bad input. The command line prints its message and exits with 2."""


class CheckError(Exception):
    """A check failed. The command line prints its message and exits with 1."""
