"""Compare deployments image by image, and measure their calibration, from what records keep.

A record's `predictions` are the argmax classes of its n images, the first n of one ordered test set. They are
stored as base64 of zlib of little-endian uint16. Records of equal `data` saw the same images, so two of them
can be compared on the first min(n). Two deployments of equal accuracy may still decide many images
differently.

A record's `reliability` lists, for equal-width bins of the top softmax probability, the number of images,
their mean confidence and their accuracy. An empty bin is [0, null, null]. The expected calibration error is
ECE = Σ_b n_b / n · |accuracy_b - confidence_b| (Naeini, Cooper and Hauskrecht, AAAI 2015).
"""

import base64
import binascii
import functools
import math
import zlib
from collections.abc import Iterable
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.records import Record
from qt_jax.reporting.pivot import (
    REFERENCE,
    Column,
    DeploymentTable,
    Row,
    Seeds,
    ended_well,
    lost,
    scores,
    spread,
)

EQUAL_ACCURACY = 0.002
"""Largest difference of top-1 between two rows that count as equally accurate."""

METRICS_OF_DECISIONS = ("top1", "accuracy")
"""Metrics that are means over images of whether a decision is right. Only their noise is known."""


class Disagreement(NamedTuple):
    """Name two rows, the fraction of images they decide differently, and the distance of their top-1."""

    first: Row
    second: Row
    fraction_differing: float
    top1_distance: float


class Reliability(NamedTuple):
    """Hold a row of a reliability diagram.

    Attributes:
      reason: Reason to show the row, such as "best".
      row: Row.
      bins: `(bins, 3)`: count, confidence and accuracy of each bin, 0 where the bin is empty.
    """

    reason: str
    row: Row
    bins: np.ndarray

    @property
    def ece(self) -> float:
        return expected_calibration_error(self.bins)


def predictions(record: Record) -> np.ndarray | None:
    """Return the decisions of a record, uint16 `(n,)`; None where it keeps none or does not name its data.

    Raises:
      InvalidInput: The decisions cannot be decoded, or there are not n of them.

    >>> text = base64.b64encode(zlib.compress(np.array([3, 1], "<u2").tobytes())).decode()
    >>> predictions({"predictions": text, "data": "hash", "n": 2}).tolist()
    [3, 1]
    """
    if not record.get("predictions") or not record.get("data"):
        return None
    try:
        decoded = _decode(record["predictions"])
        if len(decoded) != record.get("n"):
            raise ValueError(f"{len(decoded)} of them for {record.get('n')} images")
    except (ValueError, zlib.error, binascii.Error) as error:
        where = ", ".join(str(record.get(key)) for key in ("backend", "scheme", "runtime", "method"))
        raise InvalidInput(
            f"The predictions of {where} cannot be read ({error}): was the file edited?"
        ) from error
    return decoded


@functools.lru_cache(maxsize=1024)
def _decode(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<u2")


def agreement(first: Record, second: Record) -> float | None:
    """Return the fraction of images that both decide alike; None if they did not see the same images."""
    if first.get("data") != second.get("data"):
        return None
    one, other = predictions(first), predictions(second)
    if one is None or other is None:
        return None
    shared = min(len(one), len(other))
    return float(np.mean(one[:shared] == other[:shared]))


def standard_error(alike: float, difference: float, n: int) -> float:
    """Bound the standard error of a difference d between two top-1 on the same n images from above.

    Only images that the two decide differently, a fraction q = 1 - `alike`, can be right for one and wrong
    for the other. So the paired difference has a variance of at most (q - d²) / n. No labels are needed.

    >>> standard_error(alike=0.75, difference=0.0, n=100)
    0.05
    """
    return math.sqrt(max(1 - alike - difference**2, 0.0) / n)


def noise(differences: Iterable[tuple[float | None, float, int]]) -> float | None:
    """Bound two standard errors of a mean difference from above; None if one of them is unknown.

    More seeds do not make it smaller, because the seeds share their images.

    Args:
      differences: (share of images decided alike, difference of two scores, number of images) by seed.

    >>> noise([(0.75, 0.0, 100)]), noise([(None, 0.0, 100)])
    (0.1, None)
    """
    errors = []
    for alike, difference, n in differences:
        if alike is None:
            return None
        errors.append(standard_error(alike, difference, n))
    return 2 * math.sqrt(fmean(error**2 for error in errors)) if errors else None


def noise_of_drop(deployment: DeploymentTable, column: Column, row: Row) -> float | None:
    """Bound two standard errors of the drop of a row from above.

    It is known only for metrics that are means of right decisions, and where the decisions or their agreement
    with the float model were kept; else None.
    """
    own = deployment.seeds(column, REFERENCE)
    found = []
    for seed, record in deployment.seeds(column, row).items():
        value = lost(record)
        if value is not None:
            if (record.get("metric") or "top1") not in METRICS_OF_DECISIONS or not record.get("n"):
                return None
            alike = agreement(own[seed], record) if seed in own else None
            found.append((record.get("agreement") if alike is None else alike, value, record["n"]))
    return noise(found)


def cell_agreement(first: Seeds, second: Seeds) -> float | None:
    """Return the agreement of two cells, averaged over the seeds that both have."""
    found = [agreement(first[seed], second[seed]) for seed in first if seed in second]
    values = [value for value in found if value is not None]
    return spread(values)[0] if values else None


def agreement_matrix(deployment: DeploymentTable, column: Column) -> tuple[list[Row], np.ndarray]:
    """Return the rows that keep their decisions, and the agreement of every two of them.

    The agreements are `(rows, rows)`, NaN where two rows cannot be compared.
    """
    cells = deployment.cells[column]
    rows = [
        row
        for row in deployment.rows
        if any(
            ended_well(record) and predictions(record) is not None for record in cells.get(row, {}).values()
        )
    ]
    matrix = np.full((len(rows), len(rows)), np.nan)
    for i, j in combinations(range(len(rows)), 2):
        value = cell_agreement(cells[rows[i]], cells[rows[j]])
        matrix[i, j] = matrix[j, i] = np.nan if value is None else value
    np.fill_diagonal(matrix, 1.0)
    return rows, matrix


def disagreeing_pairs(deployment: DeploymentTable, column: Column, most: int = 5) -> list[Disagreement]:
    """Return the pairs of rows within `EQUAL_ACCURACY` that disagree most, largest first.

    No row is named twice. Only rows on the same number of images are paired, because the top-1 on a part of
    the images is not known without labels.
    """
    rows, matrix = agreement_matrix(deployment, column)
    cells = deployment.cells[column]
    found = []
    for i, j in combinations(range(len(rows)), 2):
        sizes = {record.get("n") for row in (rows[i], rows[j]) for record in cells[row].values()}
        values = [scores(cells[row]).values() for row in (rows[i], rows[j])]
        if len(sizes) > 1 or not all(values) or not matrix[i, j] < 1:
            continue
        top1_distance = abs(spread(values[0])[0] - spread(values[1])[0])
        if top1_distance <= EQUAL_ACCURACY + 1e-9:
            found.append(Disagreement(rows[i], rows[j], 1 - matrix[i, j], top1_distance))
    chosen: list[Disagreement] = []
    for pair in sorted(found, key=lambda pair: -pair.fraction_differing):
        if not {row for other in chosen for row in other[:2]} & {pair.first, pair.second}:
            chosen.append(pair)
    return chosen[:most]


def pooled(seeds: Seeds) -> np.ndarray | None:
    """Pool the bins of a cell over its seeds, `(bins, 3)`; None where no record has any.

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
    """Return the ECE of bins `(bins, 3)`, as the module defines it.

    >>> expected_calibration_error(np.array([[1.0, 0.5, 1.0], [3.0, 1.0, 1.0]]))
    0.125
    """
    counts, confidence, accuracy = bins.T
    return float((counts * np.abs(accuracy - confidence)).sum() / max(counts.sum(), 1))


def representative(deployment: DeploymentTable, column: Column) -> list[Reliability]:
    """Return the float model, and of all other rows those of the smallest, the median and the largest ECE."""
    found = {row: pooled(seeds) for row, seeds in deployment.cells[column].items()}
    kept = [Reliability("", row, bins) for row, bins in found.items() if bins is not None]
    shown = [item._replace(reason="FP32") for item in kept if item.row == REFERENCE]
    others = sorted((item for item in kept if item.row != REFERENCE), key=lambda item: (item.ece, item.row))
    if len(others) < 2:
        return shown + [item._replace(reason="other") for item in others]
    places = {len(others) // 2: "median", 0: "best", len(others) - 1: "worst"}
    return shown + [others[place]._replace(reason=reason) for place, reason in sorted(places.items())]
