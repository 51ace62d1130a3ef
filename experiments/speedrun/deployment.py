"""The trained network as ONNX in ONNX Runtime, FP32 and INT8, seen once and in six views."""

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
from experiments.data.augment import normalize
from experiments.speedrun.program import VIEWS, Recipe, weighted_views
from qt_jax.backends import ort
from qt_jax.export import save_verified

SPEEDRUN_SCHEMES = ("fp32", "int8-pt-minmax", "int8-pc-minmax")
"""Of ONNX Runtime: float, and its static quantization, a weight scale per tensor or per channel."""
CALIBRATION = 512
"""Training images with which ONNX Runtime takes its ranges."""
BATCH = 250
OPSET = 20
"""The first with Gelu. ONNX Runtime puts each of the nine operators that stand for it before on 8 bits, which
costs this network 1.7 points; Gelu it leaves in float."""


def deployed(
    recipe: Recipe, variables: Any, dataset: Dataset, names: Sequence[str] = SPEEDRUN_SCHEMES
) -> Iterator[dict[str, Any]]:
    """The graph's accuracy on the test images under each named scheme: scheme, top1, top1_six_views, n.

    Raises:
      InvalidInput: the graph's outputs differ from the network's.
    """
    model = recipe.model(dataset.num_classes).clone(dtype=jnp.float32)

    def forward(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(variables, x, train=False)

    graph = qt.to_onnx(forward, variables, dataset.test_images.shape[1:], opset=OPSET)
    samples = np.asarray(normalize(jnp.asarray(dataset.train_images[:8]), dataset.mean, dataset.std))
    calibration = graph_input(dataset, dataset.train_images[:CALIBRATION])
    schemes = {scheme.name: scheme for scheme in ort.BACKEND.schemes}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # where the quantizer litters
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
    """float32 `(n, num_classes)` of the test images as they are, and averaged over the six views."""
    seen = []
    views = weighted_views(jnp.asarray(dataset.test_images), VIEWS)
    for _, images in views:
        inputs = graph_input(dataset, np.asarray(images))
        parts = [session(inputs[i : i + BATCH]) for i in range(0, len(inputs), BATCH)]
        seen.append(np.concatenate(parts))
    return seen[0], np.average(seen, axis=0, weights=[weight for weight, _ in views])


def graph_input(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """uint8 images as the graph takes them: float32, normalised, channels first."""
    return np.ascontiguousarray(
        np.asarray(normalize(jnp.asarray(images), dataset.mean, dataset.std)).transpose(0, 3, 1, 2)
    )


def _accuracy(logits: np.ndarray, dataset: Dataset) -> float:
    return float(np.mean(logits.argmax(-1) == dataset.test_labels))
