"""The one exception that a script turns into a single line and exit code 2."""


class UserError(Exception):
    """Something the user can put right: a wrong option, file, size or configuration key.

    The message is one line and says what to do. Scripts print it without a traceback.
    """
