"""The one exception that means: the user can mend this."""


class InvalidInput(ValueError):
    """Input that is wrong in a way its author can mend.

    The message says what was wrong, where, and what to do. Command lines print it alone, without a
    traceback, and exit with status 2; any other exception is a defect and keeps its traceback.
    """
