"""Read flags, print text and rows, and end with an exit status: what all commands of the project share."""

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import tyro
from rich.console import Console

from qt_jax.errors import InvalidInput
from qt_jax.files import writing

PIPED_WIDTH = 130
"""Columns of text that goes to a file or a pipe."""

Options = TypeVar("Options")


class Failed(Exception):
    """Report that a command did what it was asked and the result is a failure. The message says which."""


class Terminated(KeyboardInterrupt):
    """Report a SIGTERM. It ends a command as Ctrl-C does: the processes it has started end first."""

    status = 143


def terminate_like_interrupt() -> None:
    """Make SIGTERM raise `Terminated` in the main thread from now on."""

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def statuses(failure: str | None = None) -> str:
    """Return what `--help` says about the exit status.

    Args:
      failure: What exit status 1 means, if the command has it.

    >>> statuses("no row ended well")
    'Exit status: 0 done, 1 no row ended well, 2 wrong input, 130 Ctrl-C, 143 SIGTERM.'
    """
    one = "" if failure is None else f"1 {failure}, "
    return f"Exit status: 0 done, {one}2 wrong input, 130 Ctrl-C, 143 SIGTERM."


def parse(
    options: type[Options],
    arguments: list[str] | None,
    module: str,
    *,
    about: str | None = None,
    failure: str | None = None,
    default: Options | None = None,
) -> Options:
    """Read the options of one command line of `python -m module`.

    Args:
      options: Dataclass of the flags.
      arguments: Arguments of the command line; None for those of this process.
      module: Name of the module after `python -m`.
      about: Text that `--help` begins with, with an example; None for the docstring of `options`.
      failure: What exit status 1 means, if the command has it.
      default: Values of flags that are not given; None for those of the dataclass.

    Raises:
      SystemExit: A flag or choice is unknown, or a value is out of range (status 2); tyro has printed what it
        takes instead. Or `--help` is given (status 0).
    """
    about = f"{inspect.cleandoc(about or options.__doc__ or '')}\n\n{statuses(failure)}"
    given = {} if default is None else {"default": default}
    return read_flags(options, arguments, module, description=about, **given)


def read_flags(options: Any, arguments: list[str] | None, module: str, **settings: Any) -> Any:
    """Read flags with `tyro.cli`, without colours under NO_COLOR or where its errors go to a file.

    Args:
      options: As `tyro.cli` takes them, subcommands too.
      arguments: Arguments of the command line; None for those of this process.
      module: Name of the module after `python -m`.
      **settings: Further arguments of `tyro.cli`.
    """
    tyro._experimental_options["ansi_codes"] = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return tyro.cli(options, args=arguments, prog=f"python -m {module}", **settings)


def text_console(*, stderr: bool = False, width: int = PIPED_WIDTH, soft_wrap: bool = False) -> Console:
    """Return a console as wide as the terminal, or plain and `width` columns wide in a file or a pipe.

    Args:
      stderr: Print to stderr, for a command whose stdout is for rows that a machine reads.
      width: Columns in a file or a pipe.
      soft_wrap: Leave lines as long as they are.
    """
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")  # of a terminal that knows no minus sign
    return Console(
        stderr=stderr,
        width=None if stream.isatty() else width,
        soft_wrap=soft_wrap,
        markup=False,
        highlight=False,
    )


def print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print each row as one line of JSON on stdout.

    >>> print_rows([{"backend": "onnxruntime", "ready": True}])
    {"backend": "onnxruntime", "ready": true}
    """
    for row in rows:
        print(json.dumps(row, allow_nan=False))


def exit_status(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run `command` and return the exit status, after a sentence on stderr if it is not 0.

    The status is 0 if the command is done, 1 after `Failed` or if the reader of a pipe has gone, 2 after
    InvalidInput, 130 after Ctrl-C, and 143 after SIGTERM if `terminate_like_interrupt` was called. A
    KeyboardInterrupt with a message and a `status` prints the one and gives the other. Any other exception is
    a defect and keeps its traceback.

    Args:
      command: A function without arguments. Its result is ignored.
      interrupted: The sentence after Ctrl-C or SIGTERM.
    """
    console = text_console(stderr=True, soft_wrap=True)
    try:
        with writing("What was to be written"):
            command()
        sys.stdout.flush()
    except InvalidInput as error:
        console.print(f"error: {error}", style="bold red")
        return 2
    except Failed as error:
        console.print(f"failed: {error}", style="bold red")
        return 1
    except KeyboardInterrupt as error:
        console.print(str(error) or interrupted)
        return getattr(error, "status", 130)
    except BrokenPipeError:  # such as `| head`; the interpreter would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def command(
    module: str,
    options: type[Options],
    run: Callable[[Options, Console], object],
    arguments: list[str] | None,
    *,
    failure: str | None = None,
    interrupted: str = "interrupted",
    soft_wrap: bool = False,
) -> int:
    """Run `python -m module` and return the exit status, as `exit_status` does.

    Args:
      module: Name of the module after `python -m`.
      options: Dataclass of the flags, as `parse` takes it.
      run: Called with the options and a console, which prints to stderr if `--json` gives stdout to rows.
      arguments: Arguments of the command line; None for those of this process.
      failure: What exit status 1 means, if the command has it.
      interrupted: The sentence after Ctrl-C or SIGTERM.
      soft_wrap: Leave lines as long as they are.
    """

    def parse_and_run() -> None:
        given = parse(options, arguments, module, failure=failure)
        run(given, text_console(stderr=getattr(given, "json", False), soft_wrap=soft_wrap))

    return exit_status(parse_and_run, interrupted)
