"""Calibration of deployments from the bins that records keep.

A record's `reliability` lists, for equal-width bins of the top softmax probability, the number of images,
their mean confidence and their accuracy; an empty bin is [0, null, null]. The expected calibration error is
ECE = Σ_b n_b / n · |accuracy_b - confidence_b| (Naeini, Cooper and Hauskrecht, AAAI 2015).
"""

from typing import NamedTuple

import numpy as np

from qt_jax.reporting.deployment import REFERENCE, Column, Deployment, Row, Seeds


class Reliability(NamedTuple):
    """Why a row is shown, the row, and its bins `(bins, 3)`: count, confidence, accuracy (0 where empty)."""

    why: str
    row: Row
    bins: np.ndarray

    @property
    def ece(self) -> float:
        return expected_calibration_error(self.bins)


def pooled(seeds: Seeds) -> np.ndarray | None:
    """The bins of a cell, `(bins, 3)`, with the images of all seeds together; None where no record has any.

    >>> pooled({0: {"reliability": [[1, 0.5, 1.0]]}, 1: {"reliability": [[3, 0.5, 0.0]]}}).tolist()
    [[4.0, 0.5, 0.25]]
    """
    kept = [record["reliability"] for record in seeds.values() if record.get("reliability")]
    if not kept:
        return None
    bins = np.nan_to_num(np.array(kept, dtype=np.float64))  # an empty bin holds None
    counts = bins[..., 0].sum(axis=0)
    sums = (bins[..., :1] * bins[..., 1:]).sum(axis=0)
    return np.column_stack([counts, sums / np.maximum(counts, 1)[:, None]])


def expected_calibration_error(bins: np.ndarray) -> float:
    """ECE of `(bins, 3)`, as the module defines it.

    >>> expected_calibration_error(np.array([[1.0, 0.5, 1.0], [3.0, 1.0, 1.0]]))
    0.125
    """
    counts, confidence, accuracy = bins.T
    return float((counts * np.abs(accuracy - confidence)).sum() / max(counts.sum(), 1))


def representative(deployment: Deployment, column: Column) -> list[Reliability]:
    """The float model, and of all other rows those of the smallest, the median and the largest ECE."""
    found = {row: pooled(seeds) for row, seeds in deployment.cells[column].items()}
    kept = [Reliability("", row, bins) for row, bins in found.items() if bins is not None]
    shown = [item._replace(why="FP32") for item in kept if item.row == REFERENCE]
    others = sorted((item for item in kept if item.row != REFERENCE), key=lambda item: (item.ece, item.row))
    if len(others) < 2:
        return shown + [item._replace(why="other") for item in others]
    places = {len(others) // 2: "median", 0: "best", len(others) - 1: "worst"}
    return shown + [others[place]._replace(why=why) for place, why in sorted(places.items())]
