"""Write the HTML report of a training run: `python -m experiments.report RUN_DIR`.

The report is one file that opens anywhere. The run may be finished or still under way. Nothing is trained,
exported or measured here.
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
    """File to write. Default: report.html in the folder of the run."""
    backends: tuple[Path, ...] = ()
    """Further records.jsonl files, such as that of experiments.backends --out."""


def run(options: Options, console: Console) -> None:
    """Write the file and print its path."""
    path = write_report(options.run, options.out, options.backends)
    console.print(str(path), soft_wrap=True, markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.report", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
