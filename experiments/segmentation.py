"""`python -m experiments.segmentation`: `experiments.cifar` for networks that give each pixel a class.

The stages, flags and products are those of `experiments.cifar`; tables are of mIoU and of pixel accuracy, and
masks.png shows a few images as the networks see them. The default data set is composed, see
`experiments.data.composed`; Oxford-IIIT Pet is `--dataset oxford-pet`.
"""

import sys

from rich.console import Console

from experiments.cifar import run
from experiments.command_line import exit_status
from experiments.configs.cifar import parse
from experiments.configs.segmentation import PRESETS


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a message about wrong input."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    return exit_status(
        lambda: run(parse(arguments, PRESETS, program="python -m experiments.segmentation"), console)
    )


if __name__ == "__main__":
    sys.exit(main())
