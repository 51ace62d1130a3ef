"""Raise errors whose message tells the user what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class InvalidInput(ValueError):
    """Report input that is wrong in a way its author can mend.

    The message says what was wrong, where, and what to do. Command lines print only the message, without a
    traceback, and exit with status 2. Any other exception is a defect and keeps its traceback.
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Guard imports of packages that come with the extra `name` of this package.

    Raises:
      ModuleNotFoundError: A package is missing. The message names it and the command that installs it.

    >>> with extra("export"):
    ...     import a_package_that_is_missing
    Traceback (most recent call last):
    ModuleNotFoundError: a_package_that_is_missing is missing: pip install "qt_jax[export]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("qt_jax") or "pip install" in error.msg:
            raise
        message = f'{error.name} is missing: pip install "qt_jax[{name}]"'
        raise ModuleNotFoundError(message, name=error.name) from None
