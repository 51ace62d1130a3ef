"""Train a classifier and its float twin, export and deploy both: `python -m experiments.cifar`.

`experiments.pipeline` holds the stages, `experiments.configs.training` the flags and the presets.
"""

import sys

from experiments import pipeline
from experiments.configs.training import PRESETS, Config


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status of `pipeline.launch`."""
    return pipeline.launch("experiments.cifar", PRESETS, Config.__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
