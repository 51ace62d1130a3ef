"""Compare vendors' toolchains on finished runs: `python -m experiments.backends RUN_DIR ...`.

Each network that a run of `experiments.cifar` exported (Quant-Trim and its float twin) goes through all
backends, schemes and runtimes. All of them calibrate on the first images of the training split and are judged
on the test set. records.jsonl and the report go to --out.
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
from qt_jax.command_line import exit_status, parse, text_console
from qt_jax.comparison import ALL_ROWS_FAILED, INTERRUPTED, Settings, evaluate_all


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare how every vendor's toolchain treats the networks of finished runs.

    The same command goes on where it stopped.

    Example:
        python -m experiments.backends runs/cifar10-fast-quartic-0 --out runs/deployed --backends onnxruntime
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs of experiments.cifar, all on one data set."""
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes]
    data_dir: Path | None = None
    """Folder or archive that holds the data set, as for experiments.cifar."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `exit_status` does; 1 if every row failed."""

    def whole() -> None:
        options = parse(Options, arguments, "experiments.backends", failure=ALL_ROWS_FAILED)
        run(options, text_console(stderr=options.settings.json))

    return exit_status(whole, INTERRUPTED)


def run(options: Options, console: Console) -> None:
    """Evaluate every network of every run, then write the report.

    Raises:
      InvalidInput: No run is named, or the runs differ in data set or number of calibration images.
    """
    if not options.runs:
        raise qt.InvalidInput("No run is named: give the folders of finished runs of experiments.cifar.")
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
