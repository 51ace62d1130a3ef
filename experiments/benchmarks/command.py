"""The command line of a benchmark."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console

from experiments.command_line import exit_status

PIPED_WIDTH = 130
"""Characters of a table's lines where no terminal says how many there are."""

Options = TypeVar("Options")


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
