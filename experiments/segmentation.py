"""`python -m experiments.segmentation`: `experiments.cifar` for networks that give each pixel a class.

The stages, flags and products are those of `experiments.cifar`; tables are of mIoU and of pixel accuracy, and
masks.png shows a few images as the networks see them. The default data set is composed, see
`experiments.data.composed`; Oxford-IIIT Pet is `--dataset oxford-pet`.
"""

import sys

from experiments import cifar
from experiments.configs.training import SEGMENTATION_PRESETS

ABOUT = """Train a network that gives each pixel a class, with Quant-Trim and without; export both, compare.

Relaunching the same command resumes; finished work is not redone.

Example:
    python -m experiments.segmentation --preset smoke
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `experiments.cifar` does."""
    return cifar.main(arguments, SEGMENTATION_PRESETS, "experiments.segmentation", ABOUT)


if __name__ == "__main__":
    sys.exit(main())
