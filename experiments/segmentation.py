"""Train, export and deploy a network that gives each pixel a class: `python -m experiments.segmentation`.

The stages, flags and products are those of `experiments.cifar`. Tables show mIoU and pixel accuracy, and
masks.png shows a few images as the networks see them. The default data set is composed, see
`experiments.data.composed`. Oxford-IIIT Pet is `--dataset oxford-pet`.
"""

import sys

from experiments import pipeline
from experiments.configs.training import SEGMENTATION_PRESETS

ABOUT = """Train a network that gives each pixel a class, and its float twin; export and compare both.

The same command resumes a run that was interrupted. Finished work is not repeated.

Example:
    python -m experiments.segmentation --preset smoke
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status of `pipeline.launch`."""
    return pipeline.launch("experiments.segmentation", SEGMENTATION_PRESETS, ABOUT, arguments)


if __name__ == "__main__":
    sys.exit(main())
