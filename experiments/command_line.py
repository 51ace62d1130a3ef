"""The command lines of this project: how wide their tables are, and how they end when the input is wrong."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console

import qt_jax as qt

PIPED_WIDTH = 130
"""Characters of a table's lines where no terminal says how many there are."""

Options = TypeVar("Options")


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


def command(
    module: str,
    options: type[Options],
    run: Callable[[Options, Console], object],
    arguments: list[str] | None,
) -> int:
    """Runs `python -m module`; returns the exit status: 0, or 2 after a message about wrong input.

    Args:
      options: dataclass of the flags.
      run: what is run with them, and where its tables go.
      arguments: of the command line; None: those of this process.
    """
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    return exit_status(lambda: run(tyro.cli(options, args=arguments, prog=f"python -m {module}"), console))
