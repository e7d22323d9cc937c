"""The one exception that stands for a mistake of the user's.

It sits below every other room, because all of them raise it: the command line turns it into one line on standard
error and exit status 2, and a Python caller can catch it as the `ValueError` that it is.
"""


class UsageError(ValueError):
    """Something the caller asked for cannot be done; the message is one full sentence that says why."""
