"""What the command lines share: how flags are read, where text and rows go, how a command ends."""

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

PIPED_WIDTH = 130
"""Characters of a table's lines where no terminal says how many there are."""

Options = TypeVar("Options")


class Failed(Exception):
    """A command did what it was asked, and what came of it is a failure; the message says which."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: the processes it has started end first."""

    status = 143


def terminate_like_interrupt() -> None:
    """SIGTERM raises `Terminated` in the main thread from now on."""

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def statuses(failure: str | None = None) -> str:
    """What `--help` says of the exit status.

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
    """The options of one command line of `python -m module`.

    Args:
      options: dataclass of the flags.
      arguments: of the command line; None: those of this process.
      module: after `python -m`.
      about: what `--help` begins with, with an example; None: the docstring of `options`.
      failure: what exit status 1 means, if the command has it.
      default: the values of flags that are not given; None: those of the dataclass.

    Raises:
      SystemExit: an unknown flag or choice, or a value out of range (status 2), after tyro has printed what
        it takes instead; `--help` (status 0).
    """
    about = f"{inspect.cleandoc(about or options.__doc__ or '')}\n\n{statuses(failure)}"
    given = {} if default is None else {"default": default}
    return read_flags(options, arguments, module, description=about, **given)


def read_flags(options: Any, arguments: list[str] | None, module: str, **settings: Any) -> Any:
    """`tyro.cli`, which by itself knows nothing of NO_COLOR, nor that its errors may go to a file.

    Args:
      options: as `tyro.cli` takes them, subcommands too.
      arguments: of the command line; None: those of this process.
      module: after `python -m`.
      **settings: further ones of `tyro.cli`.
    """
    tyro._experimental_options["ansi_codes"] = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return tyro.cli(options, args=arguments, prog=f"python -m {module}", **settings)


def text_console(*, stderr: bool = False, width: int = PIPED_WIDTH, soft_wrap: bool = False) -> Console:
    """Where text goes: as wide as the terminal, or `width` columns, without colours, into a file or a pipe.

    Args:
      stderr: of a command whose stdout is for rows that a machine reads.
      width: into a file or a pipe.
      soft_wrap: leave lines as long as they are.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        width=None if stream.isatty() else width,
        soft_wrap=soft_wrap,
        markup=False,
        highlight=False,
    )


def print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """Each row as one line of JSON on stdout.

    >>> print_rows([{"backend": "onnxruntime", "ready": True}])
    {"backend": "onnxruntime", "ready": true}
    """
    for row in rows:
        print(json.dumps(row, allow_nan=False))


def exit_status(command: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Runs `command`; returns the exit status, after a sentence on stderr if it is not 0.

    0 done; 1 `Failed`, or the reader of a pipe has gone; 2 wrong input; 130 Ctrl-C; 143 SIGTERM, after
    `terminate_like_interrupt`. A KeyboardInterrupt that has a message and a `status` ends with
    these. Any other exception is a defect and keeps its traceback.

    Args:
      command: takes nothing; what it returns is not looked at.
      interrupted: what to say after Ctrl-C or SIGTERM.
    """
    console = text_console(stderr=True, soft_wrap=True)
    try:
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
    except BrokenPipeError:  # of `| head`, say; the interpreter would complain once more at its end
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
    """Runs `python -m module`; returns the exit status, as `exit_status` does.

    Args:
      module: after `python -m`.
      options: dataclass of the flags, as `parse` takes it.
      run: what is run with them, and where its text goes: stderr where `--json` gives stdout to rows.
      arguments: of the command line; None: those of this process.
      failure: what exit status 1 means, if the command has it.
      interrupted: what to say after Ctrl-C or SIGTERM.
      soft_wrap: leave lines as long as they are.
    """

    def whole() -> None:
        given = parse(options, arguments, module, failure=failure)
        run(given, text_console(stderr=getattr(given, "json", False), soft_wrap=soft_wrap))

    return exit_status(whole, interrupted)
