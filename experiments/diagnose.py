"""Run `python -m experiments.diagnose RUN_DIR|MODEL.onnx`: tell which layer costs what, why, and what helps.

This command finds the networks and the data of a run. `qt_jax.diagnosis` does the rest, and diagnoses files.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

import qt_jax as qt
from experiments.data import load
from experiments.runs import model_input, networks, read_config_json
from qt_jax.backends.registry import select
from qt_jax.command_line import command, print_rows, terminate_like_interrupt
from qt_jax.diagnosis.report import INTERRUPTED, DiagnosisSettings, layer_rows, write_diagnosis
from qt_jax.diagnosis.subject import Subject, load_subject, read_subject


@dataclasses.dataclass(frozen=True)
class Options:
    """Find the layers that cost a network its accuracy on low-bit integers, say why, and try what helps.

    Each layer is rounded alone, then all layers but it. Tensors are searched for outliers, dead channels and
    saturation. Every remedy is tried, and advised only if it helps by more than chance. With one label for
    each image the right ones are counted. Otherwise the outputs are compared with those in floating point, in
    dB. The page, its pictures and the measurements go to --out. After an interruption the same command goes
    on there.

    Example:
        python -m experiments.diagnose experiments/results/cifar10-resnet8 --scheme int4w-pt --out runs/found
    """

    subject: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|MODEL.onnx")]
    """Folder of a finished experiments.cifar, or a float ONNX network of any kind."""
    method: str | None = None
    """Of a run: which of its networks, such as "float". Default: the one trained with quantization."""
    split: Literal["validation", "test"] = "validation"
    """Of a run: the images to judge by. Advice chosen on the test set flatters itself."""
    calibration: Path | None = None
    """Of a model: samples as it takes them, in .npz, .npy or a folder of .npy."""
    test: Path | None = None
    """Of a model: samples to judge by, preferably of a validation split, with "labels" if there are any."""
    settings: Annotated[DiagnosisSettings, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DiagnosisSettings
    )
    data_dir: Path | None = None
    """Folder or archive that holds the data set, as for `experiments.cifar`."""
    json: bool = False
    """Print a JSON line for each layer on stdout, and all text on stderr."""


def run(options: Options, console: Console) -> None:
    """Diagnose the network and write what is found.

    Raises:
      InvalidInput: The run, a file or a setting is wrong.
    """
    terminate_like_interrupt()
    backends = select(options.settings.backends)
    if not options.subject.exists():
        raise qt.InvalidInput(
            f"{options.subject} is not there: name the folder of a run, or a float ONNX model."
        )
    of_run = options.subject.is_dir()
    subject = _of_run(options) if of_run else _of_file(options)
    default = options.subject if of_run else options.subject.with_suffix(".diagnosis")
    out = options.settings.out or default
    found = write_diagnosis(subject, options.settings, backends, out, console, flags=of_run)
    if options.json:
        print_rows(layer_rows(found))


def _of_run(options: Options) -> Subject:
    """Load a network of a run, with the run's own data."""
    if options.calibration or options.test:
        raise qt.InvalidInput("--calibration and --test go with a MODEL.onnx: a run brings its own data.")
    folder = options.subject
    config = read_config_json(folder)
    found = {identity["method"]: path for path, identity in networks(folder, config)}
    method = options.method or next(iter(found))
    if method not in found:
        raise qt.InvalidInput(f"{folder} has no network {method!r}: choose among {sorted(found)}.")
    dataset = load(config["dataset"], options.data_dir, seed=0)
    splits = {
        "validation": (dataset.validation_images, dataset.validation_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    images, labels = (array[: options.settings.limit] for array in splits[options.split])
    calibration = dataset.train_images[: config["calibration_size"]]
    return load_subject(
        found[method],
        f"{folder.resolve().name}, {method}",
        model_input(dataset, calibration),
        model_input(dataset, images),
        labels,
        ranges=options.settings.ranges,
        criteria=options.settings.criteria,
    )


def _of_file(options: Options) -> Subject:
    """Load an ONNX file, with the arrays that the command line names."""
    path, settings = options.subject, options.settings
    if options.method is not None:
        raise qt.InvalidInput("--method goes with the folder of a run.")
    if options.calibration is None or options.test is None:
        raise qt.InvalidInput(
            f"{path} is a file: say on what to calibrate and to judge it, with --calibration c.npz and "
            "--test t.npz (or .npy files, or folders)."
        )
    return read_subject(
        path,
        options.calibration,
        options.test,
        ranges=settings.ranges,
        limit=settings.limit,
        criteria=settings.criteria,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, as `command` does."""
    return command("experiments.diagnose", Options, run, arguments, interrupted=INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
