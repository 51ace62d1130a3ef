"""What a run says of its networks, so that `python -m qt_jax.export` can export them again on its own."""

from pathlib import Path

import numpy as np

from experiments.configs.cifar import Config
from experiments.data import Dataset
from experiments.data.augment import normalize
from experiments.models import create
from experiments.training.quantizers import keeps_ranges, quantization
from qt_jax.export.description import Description, Samples, write_description, write_samples

SAMPLES = "samples.npz"
CALIBRATION, PARITY = 512, 1000
"""At most so many training images to calibrate with, validation images to compare with JAX on."""


def describe(config: Config, dataset: Dataset, checkpoints: str, path: Path) -> None:
    """Writes what is missing: the description of a trained network to `path`, and the samples beside it.

    Args:
      config: of this network; of the twin for the float twin.
      dataset: gives the shape, the classes and the samples.
      checkpoints: their folder, relative to that of `path`.
      path: of the JSON file.
    """
    samples = path.with_name(SAMPLES)
    if not samples.exists():
        chosen = (
            dataset.train_images[: min(CALIBRATION, config.calibration_size)],
            dataset.validation_images[:PARITY],
        )
        arrays = (np.asarray(normalize(images, dataset.mean, dataset.std)) for images in chosen)
        write_samples(Samples(*arrays), samples)
    if path.exists():
        return
    specs = quantization(config, create(config.model, dataset.num_classes), dataset.train_images.shape[1:])
    description = Description(
        model="experiments.models:create",
        arguments={"name": config.model, "num_classes": dataset.num_classes},
        call={"train": False},
        input_shape=dataset.train_images.shape[1:],
        checkpoint=checkpoints,
        collections={"params": "average" if config.ema else "params", "batch_stats": "batch_stats"},
        quantization=specs if keeps_ranges(config) else None,
        samples=SAMPLES,
    )
    write_description(description, path)
