"""Show test images of a segmentation run beside their true masks and each network's, in FP32 and INT4."""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import qt_jax as qt
from qt_jax.backends import ort
from qt_jax.backends.rows import OUTPUTS, read_outputs
from qt_jax.files import staged
from qt_jax.reporting.pivot import title

DIGEST = "networks"
"""Key, in the file of masks, of the digest of the networks that the masks come from."""
SHOWN = 6
"""Images that are shown, the first of the test set."""
MASK_SCHEMES = {"fp32": "FP32", "int4w-pt-minmax": "INT4 weights"}
"""Scheme of onnxruntime -> its name in the figure."""
COLOURS = (
    *("#f0f0f0", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"),
    *("#7B4B2A", "#8C8C8C"),
)
"""Colours of the classes: a pale one for the first, then ten that can be told apart."""


def decided_masks(
    networks: Mapping[str, Path],
    calibration: np.ndarray,
    test_set: tuple[np.ndarray, np.ndarray],
    path: Path,
) -> dict[str, np.ndarray]:
    """Compute the class that each network gives each pixel under each of `MASK_SCHEMES`.

    The result is kept in `path` and read from there. It is computed again only for other networks.

    Args:
      networks: Method -> ONNX file.
      calibration: Calibration images, as `qt_jax.evaluate` takes them.
      test_set: A few test images with their masks, as `qt_jax.evaluate` takes them.
      path: File of the masks (.npz).

    Returns:
      "method/scheme" -> uint8 `(n, height, width)`, without the schemes that failed in onnxruntime.
    """
    networks_now = _digest(networks)
    if _digest_in(path) != networks_now:
        found = {DIGEST: np.array(networks_now)}
        for method, network in networks.items():
            with tempfile.TemporaryDirectory() as folder:
                rows = qt.evaluate(
                    network,
                    calibration,
                    test_set,
                    backends=[ort.BACKEND.name],
                    schemes=list(MASK_SCHEMES),
                    runtimes=[ort.REFERENCE.name],
                    folder=folder,
                )
                for row in rows:
                    if row["status"] == "ok":
                        logits = read_outputs(Path(folder, row["log"]).with_name(OUTPUTS), {"logits": True})[
                            "logits"
                        ]
                        found[f"{method}/{row['scheme']}"] = logits.argmax(axis=1).astype(np.uint8)
        with staged(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **found)
    with np.load(path) as file:
        return {name: masks for name, masks in file.items() if name != DIGEST}


def _digest(networks: Mapping[str, Path]) -> str:
    """Return the SHA-256 of the networks' names and files."""
    parts = (f"{method} {hashlib.sha256(path.read_bytes()).hexdigest()}" for method, path in networks.items())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest_in(path: Path) -> str | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        return str(file[DIGEST]) if DIGEST in file else None


def masks_figure(
    images: np.ndarray,
    truth: np.ndarray,
    decided: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Write a PNG with one row per image: the image, its true mask, and each network's with its accuracy.

    Args:
      images: Images, uint8 `(n, height, width, 3)`.
      truth: True masks, integers `(n, height, width)`.
      decided: Masks as `decided_masks` returns them.
      class_names: One name per class, for the legend.
      path: File of the PNG, replaced if it exists.
    """
    columns = {"image": images, "truth": truth}
    for key, masks in decided.items():
        method, _, scheme = key.partition("/")
        columns[f"{title(method)}\n{MASK_SCHEMES[scheme]}"] = masks
    figure = Figure(figsize=(1.7 * len(columns), 1.85 * len(images) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    colours = ListedColormap(COLOURS[: len(class_names)])
    for row, line in enumerate(grid):
        for axes, (name, values) in zip(line, columns.items(), strict=True):
            axes.imshow(
                values[row], cmap=colours, vmin=-0.5, vmax=len(class_names) - 0.5, interpolation="nearest"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(name, fontsize=9)
            if values is not images and values is not truth:
                right = qt.metrics.pixel_accuracy(values[row], truth[row])
                axes.set_xlabel(f"{100 * right:.1f} % of pixels", fontsize=8)
    handles = [
        Patch(facecolor=colours(index), edgecolor="0.5", label=name) for index, name in enumerate(class_names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    with staged(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
