"""The trained network as ONNX in ONNX Runtime, FP32 and INT8, seen once and in six views."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments.data import Dataset
from experiments.data.augment import normalize
from experiments.speedrun.program import VIEWS, weighted_views
from experiments.speedrun.recipe import Recipe
from qt_jax.backends import ort

SCHEMES = ("fp32", "int8-pt-minmax", "int8-pc-minmax")
"""Of ONNX Runtime: float, and its static quantization, a weight scale per tensor or per channel."""
CALIBRATION = 512
"""Training images with which ONNX Runtime takes its ranges."""
BATCH = 250


def deployed(recipe: Recipe, variables: Any, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The graph's accuracy on the test images under each scheme: scheme, top1, top1_six_views, n."""
    model = recipe.model(dataset.num_classes).clone(dtype=jnp.float32)
    height, width, channels = dataset.test_images.shape[1:]
    graph = qt.to_onnx(
        lambda variables, x: model.apply(variables, x, train=False), variables, (height, width, channels)
    )
    calibration = graph_input(dataset, dataset.train_images[:CALIBRATION])
    schemes = {scheme.name: scheme for scheme in ort.BACKEND.schemes}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # where the quantizer litters
        source = Path(scratch, "model.onnx")
        qt.export.save(graph, source)
        for name in SCHEMES:
            folder = Path(scratch, name)
            folder.mkdir()
            ort.BACKEND.compile(source, calibration, schemes[name], folder)
            session = ort.BACKEND.load(folder, schemes[name], ort.OPTIMIZED)
            once, all_views = logits(session, dataset, 1), logits(session, dataset, VIEWS)
            yield {
                "scheme": name,
                "top1": _accuracy(once, dataset),
                "top1_six_views": _accuracy(all_views, dataset),
                "n": len(dataset.test_labels),
            }


def logits(session: Any, dataset: Dataset, views: int) -> np.ndarray:
    """float32 `(n, num_classes)` of the test images, averaged over the views."""
    total = 0.0
    for weight, images in weighted_views(jnp.asarray(dataset.test_images), views):
        inputs = graph_input(dataset, np.asarray(images))
        parts = [session(inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH)]
        total = total + weight * np.concatenate(parts)
    return total


def graph_input(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """uint8 images as the graph takes them: float32, normalised, channels first."""
    return np.ascontiguousarray(
        np.asarray(normalize(jnp.asarray(images), dataset.mean, dataset.std)).transpose(0, 3, 1, 2)
    )


def _accuracy(logits: np.ndarray, dataset: Dataset) -> float:
    return float(np.mean(logits.argmax(-1) == dataset.test_labels))
