"""`python -m experiments.report RUN_DIR`: one HTML file of a training run, which opens anywhere.

Reads what the folder holds, of a finished run or one under way, and writes report.html into it. Nothing is
trained, exported or measured here.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.run_summary import write_report
from qt_jax.command_line import command


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the HTML report of a run of experiments.cifar.

    Example:
        python -m experiments.report runs/cifar10-fast-quartic-0
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Path | None = None
    """The file to write. Default: report.html in the folder of the run."""
    backends: tuple[Path, ...] = ()
    """Further records.jsonl, such as those of experiments.backends --out."""


def run(options: Options, console: Console) -> None:
    """Writes the file and says where."""
    path = write_report(options.run, options.out, options.backends)
    console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `command` does."""
    return command("experiments.report", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
