"""`python -m experiments.backends RUN_DIR ...`: finished runs through every vendor's toolchain, compared.

Takes each network that a run of `experiments.cifar` exported (Quant-Trim and its float twin) through all
backends, schemes and runtimes, calibrated on the first images of the training split and judged on the test
set, the same for all, and writes records.jsonl and the report to --out.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import qt_jax as qt
from experiments.data import load
from experiments.runs import model_input, networks, read_config_json
from qt_jax.comparison import GOES_ON, NO_ROW, Settings, evaluate_all
from qt_jax.command_line import exit_status, parse, text_console


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare how every vendor's toolchain treats the networks of finished runs.

    Relaunching the same command goes on where it stopped.

    Example:
        python -m experiments.backends runs/cifar10-fast-quartic-0 --out runs/deployed --backends onnxruntime
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished `python -m experiments.cifar`, all of one data set."""
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes]
    data_dir: Path | None = None
    """Folder or archive that holds the data set, as for `experiments.cifar`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `exit_status` does; 1 if no row ended well."""

    def whole() -> None:
        options = parse(Options, arguments, "experiments.backends", failure=NO_ROW)
        run(options, text_console(stderr=options.settings.json))

    return exit_status(whole, GOES_ON)


def run(options: Options, console: Console) -> None:
    """Every network of every run, then the report."""
    if not options.runs:
        raise qt.InvalidInput("No run is named: give the folders of finished experiments.cifar.")
    configs = {folder: read_config_json(folder) for folder in options.runs}
    names = sorted({config["dataset"] for config in configs.values()})
    if len(names) != 1:
        raise qt.InvalidInput(f"The runs use several data sets ({', '.join(names)}): compare one at a time.")
    dataset = load(names[0], options.data_dir, seed=0)
    sizes = {config["calibration_size"] for config in configs.values()}
    if options.settings.calibration_size is not None:
        sizes = {options.settings.calibration_size}
    if len(sizes) != 1:
        raise qt.InvalidInput(f"The runs calibrate on {sorted(sizes)} images: choose one --calibration-size.")
    [size] = sizes
    models = [entry for folder, config in configs.items() for entry in networks(folder, config)]
    images = dataset.test_images[: options.settings.limit]
    labels = dataset.test_labels[: options.settings.limit]
    evaluate_all(
        models,
        model_input(dataset, dataset.train_images[:size]),
        (model_input(dataset, images), labels),
        options.settings,
        console,
    )


if __name__ == "__main__":
    sys.exit(main())
