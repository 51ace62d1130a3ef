"""How every command of this project ends when its input is wrong: one message, exit status 2."""

from collections.abc import Callable

from rich.console import Console

import qt_jax as qt


def exit_status(command: Callable[[], object]) -> int:
    """Runs `command`; returns 0, or 2 after printing what was wrong with the user's input.

    Any other exception is a defect and keeps its traceback.
    """
    try:
        command()
    except qt.InvalidInput as error:
        console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        console.print(f"error: {error}", style="bold red")
        return 2
    return 0
