"""Deploy the trained network in ONNX Runtime, in FP32 and INT8, on one view and on six of each image."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments.data import Dataset
from experiments.data.augment import VIEWS, normalize, weighted_views
from experiments.speedrun.program import Speedrun
from qt_jax.backends import ort
from qt_jax.export import save_verified

SPEEDRUN_SCHEMES = ("fp32", "int8-pt-minmax", "int8-pc-minmax")
"""Schemes of ONNX Runtime: float, and static quantization with a weight scale per tensor or per channel."""
CALIBRATION = 512
"""Training images on which ONNX Runtime calibrates."""
BATCH = 250
"""Images in one call of the session."""
OPSET = 20
"""The first opset with Gelu, which ONNX Runtime leaves in float. It quantizes each of the nine operators that
replace Gelu in older opsets to 8 bits, which costs this network 1.7 points."""


def deploy(
    recipe: Speedrun, variables: Any, dataset: Dataset, names: Sequence[str] = SPEEDRUN_SCHEMES
) -> Iterator[dict[str, Any]]:
    """Yield the graph's accuracy on the test images under each scheme: scheme, top1, top1_six_views, n.

    Args:
      recipe: Speedrun of the network.
      variables: Its trained variables.
      dataset: Test images, and training images for the calibration.
      names: Names of the schemes.

    Raises:
      InvalidInput: The graph's outputs differ from the network's.
    """
    model = recipe.model(dataset.num_classes).clone(dtype=jnp.float32)

    def forward(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(variables, x, train=False)

    graph = qt.to_onnx(forward, variables, dataset.test_images.shape[1:], opset=OPSET, check=False)
    samples = np.asarray(normalize(jnp.asarray(dataset.train_images[:8]), dataset.mean, dataset.std))
    calibration = graph_input(dataset, dataset.train_images[:CALIBRATION])
    schemes = {scheme.name: scheme for scheme in ort.BACKEND.schemes}
    # The quantizer leaves files in the working directory.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        source = Path(scratch, "model.onnx")
        save_verified(graph, source, forward, variables, samples)
        for name in names:
            folder = Path(scratch, name)
            folder.mkdir()
            ort.BACKEND.compile(source, calibration, schemes[name], folder)
            session = ort.BACKEND.load(folder, schemes[name], ort.OPTIMIZED)
            once, averaged = logits(session, dataset)
            yield {
                "scheme": name,
                "top1": _accuracy(once, dataset),
                "top1_six_views": _accuracy(averaged, dataset),
                "n": len(dataset.test_labels),
            }


def logits(session: Any, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of the test images as they are, and averaged over six views: float32 (n, classes)."""
    seen = []
    views = weighted_views(jnp.asarray(dataset.test_images), VIEWS)
    for _, images in views:
        inputs = graph_input(dataset, np.asarray(images))
        parts = [session(inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH)]
        seen.append(np.concatenate(parts))
    return seen[0], np.average(seen, axis=0, weights=[weight for weight, _ in views])


def graph_input(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Return uint8 images as the graph takes them: float32, normalised, channels first."""
    return np.ascontiguousarray(
        np.asarray(normalize(jnp.asarray(images), dataset.mean, dataset.std)).transpose(0, 3, 1, 2)
    )


def _accuracy(logits: np.ndarray, dataset: Dataset) -> float:
    return float(np.mean(logits.argmax(-1) == dataset.test_labels))
