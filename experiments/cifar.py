"""`python -m experiments.cifar --sched quartic`: train, export, deploy at low bits, compare with a twin.

Stages: train -> (float twin) -> describe -> export -> verify -> evaluate -> table, figure, report. Each
leaves its product in the run's folder; a relaunch goes on from the first that is missing.
`experiments.segmentation` is the same with other presets.
"""

import sys
from collections.abc import Mapping

from experiments.configs.training import PRESETS, Config, parse
from experiments.pipeline import run
from qt_jax.command_line import exit_status, text_console


def main(
    arguments: list[str] | None = None,
    presets: Mapping[str, Config] = PRESETS,
    module: str = "experiments.cifar",
    about: str | None = None,
) -> int:
    """Runs the command line; returns the exit status, as `exit_status` does; 143 or 130 when SIGTERM or
    Ctrl-C has ended training, with all of it saved."""
    console = text_console(soft_wrap=True)
    return exit_status(
        lambda: run(parse(arguments, presets, module, about), console),
        "interrupted; the same command goes on from the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main())
