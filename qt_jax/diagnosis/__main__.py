"""Run `python -m qt_jax.diagnosis MODEL.onnx ...`: tell which layer costs what, why, and what helps."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from qt_jax.errors import extra

with extra("backends"):
    import tyro
    from rich.console import Console

    from qt_jax.backends.registry import select
    from qt_jax.command_line import command, print_rows, terminate_like_interrupt
    from qt_jax.diagnosis.report import INTERRUPTED, DiagnosisSettings, layer_rows, write_diagnosis
    from qt_jax.diagnosis.subject import read_subject


@dataclasses.dataclass(frozen=True)
class Options:
    """Find the layers that cost a network its accuracy on low-bit integers, say why, and try what helps.

    Each layer is rounded alone, then all layers but it. Tensors are searched for outliers, dead channels and
    saturation. Every remedy is tried, and advised only if it helps by more than chance. With one label for
    each image the right ones are counted. Otherwise the outputs are compared with those in floating point, in
    dB. The page, its pictures and the measurements go to --out. After an interruption the same command goes
    on there.

    Example:
        python -m qt_jax.diagnosis model.onnx --calibration c.npz --test t.npz --scheme int8-pt --apply
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL.onnx")]
    """Float ONNX network of any kind: a classifier, detector, segmenter, regressor, with any inputs."""
    calibration: Path
    """Samples as the model takes them: .npz or a folder of .npy, by the names of the inputs ("images" will do
    for a single one), or one .npy. A .npy may be larger than memory."""
    test: Path
    """Samples to judge by, in the same forms, with "labels" if there are any; preferably of a validation
    split."""
    settings: Annotated[DiagnosisSettings, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DiagnosisSettings
    )
    json: bool = False
    """Print a JSON line for each layer on stdout, and all text on stderr."""


def run(options: Options, console: Console) -> None:
    """Diagnose the file and write what is found.

    Raises:
      InvalidInput: A file or a setting is wrong.
    """
    terminate_like_interrupt()
    settings = options.settings
    backends = select(settings.backends)
    subject = read_subject(
        options.model,
        options.calibration,
        options.test,
        ranges=settings.ranges,
        limit=settings.limit,
        criteria=settings.criteria,
    )
    out = settings.out or options.model.with_suffix(".diagnosis")
    found = write_diagnosis(subject, settings, backends, out, console)
    if options.json:
        print_rows(layer_rows(found))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, as `command` does."""
    return command("qt_jax.diagnosis", Options, run, arguments, interrupted=INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
