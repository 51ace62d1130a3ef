"""Prepare a third-party ONNX model and data to judge it by: `python -m experiments.text_direction WHEEL`.

The model is the classifier of PaddlePaddle's OCR that tells upright lines of text from lines turned by 180
degrees. It is a MobileNetV3, exported by Paddle at opset 11 with open image sizes. It comes inside the
package rapidocr-onnxruntime 1.4.4 (Apache-2.0): `pip download --no-deps rapidocr-onnxruntime==1.4.4`. The
data are lines of pseudo-words, drawn with Pillow's own font, half of them turned.

The command writes model.onnx, calibration.npz and test.npz, which `python -m qt_jax.backends run` takes. The
output of the model is a softmax, not logits. The NLL, Brier score and ECE of these rows are therefore those
of a softmax applied twice.
"""

import dataclasses
import sys
import zipfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

import qt_jax as qt
from qt_jax.command_line import command

MEMBER = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
"""Path of the model inside the wheel."""
HEIGHT, WIDTH = 48, 192
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a third-party ONNX classifier, calibration images and a labelled test set.

    Example:
        pip download --no-deps rapidocr-onnxruntime==1.4.4
        python -m experiments.text_direction rapidocr_onnxruntime-1.4.4-py3-none-any.whl --out runs/text
    """

    wheel: Annotated[Path, tyro.conf.Positional]
    """Downloaded wheel of rapidocr-onnxruntime."""
    out: Path
    """Folder for model.onnx, calibration.npz and test.npz."""
    calibration_size: int = 128
    """Number of calibration images."""
    test_size: int = 1000
    """Number of test images."""
    seed: int = 0
    """Seed of the words, sizes and colours."""


def lines_of_text(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw lines of text, half of them turned.

    Returns:
      Images `(count, 3, 48, 192)`, float32 in [-1, 1], and labels `(count,)`: 0 upright, 1 turned.

    >>> images, labels = lines_of_text(3, seed=0)
    >>> images.shape, labels.shape
    ((3, 3, 48, 192), (3,))
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    pictures = [_line(rng).rotate(180 * int(label)) for label in labels]
    pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(0, 3, 1, 2)), labels


def _line(rng: np.random.Generator) -> Image.Image:
    """Draw a line of pseudo-words on a plain ground with noise."""
    dark, light = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    ground = np.clip(light + rng.normal(0, 6, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(ground)
    words = ("".join(rng.choice(LETTERS, rng.integers(3, 9))) for _ in range(3))
    font = ImageFont.load_default(int(rng.integers(22, 34)))
    place = (int(rng.integers(2, 12)), int(rng.integers(2, 12)))
    ImageDraw.Draw(picture).text(place, " ".join(words), tuple(int(value) for value in dark), font)
    return picture


def run(options: Options, _: Console) -> None:
    """Write the three files. Raise InvalidInput if the wheel does not hold the model."""
    try:
        with zipfile.ZipFile(options.wheel) as archive:
            model = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise qt.InvalidInput(
            f"{options.wheel} does not hold {MEMBER} ({error}): "
            "pip download --no-deps rapidocr-onnxruntime==1.4.4"
        ) from error
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "model.onnx").write_bytes(model)
    calibration, _ = lines_of_text(options.calibration_size, options.seed + 1)
    images, labels = lines_of_text(options.test_size, options.seed)
    np.savez(options.out / "calibration.npz", images=calibration)
    np.savez(options.out / "test.npz", images=images, labels=labels)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return the exit status as `command` does."""
    return command("experiments.text_direction", Options, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
