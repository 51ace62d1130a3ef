"""Records arranged for comparison: by method, scheme and seed; and the spread over seeds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.reporting.records import Record

METHODS = {"quant-trim": "Quant-Trim", "float": "float twin"}
"""Known methods and their titles, in the order in which tables and figures show them; others follow."""

METRICS = {"top1": "top-1", "miou": "mIoU"}
"""What a table or figure can be of, and its name there. Of segmentation, top-1 is the pixel accuracy."""


class Comparison(NamedTuple):
    """`cells[method][scheme][seed]` is a record; `methods` and `schemes` say in which order to show them."""

    methods: list[str]
    schemes: list[str]
    cells: dict[str, dict[str, dict[int | None, Record]]]
    reference: str
    """The scheme that drops are counted from: FP32 of the backend that ran first."""


def compare(records: Sequence[Record]) -> Comparison:
    """Arrange records of one task and model. Of two for the same cell, the later one counts.

    A scheme is called by its name, preceded by its backend's where there are several backends.

    Raises InvalidInput if there are no records, none of scheme fp32, or several tasks or models.

    >>> record = {"backend": "onnxruntime", "scheme": "fp32", "method": "float", "seed": 0, "top1": 0.9}
    >>> compare([record]).cells["float"]["fp32"][0]["top1"]
    0.9
    """
    for key in ("task", "model"):
        found = sorted({str(record.get(key)) for record in records})
        if len(found) > 1:
            raise InvalidInput(
                f"One table compares one {key}, the records hold {found}: select one {key} first."
            )
    several = len({record["backend"] for record in records}) > 1
    cells: dict[str, dict[str, dict[int | None, Record]]] = {}
    schemes: dict[str, None] = {}
    reference = None
    for record in records:
        label = f"{record['backend']} {record['scheme']}" if several else record["scheme"]
        schemes.setdefault(label)
        cells.setdefault(record["method"], {}).setdefault(label, {})[record["seed"]] = record
        if reference is None and record["scheme"] == "fp32":
            reference = label
    if reference is None:
        raise InvalidInput(
            "The records hold no fp32 row to compare with: were they written by qt_jax.evaluate?"
        )
    known = [method for method in METHODS if method in cells]
    others = sorted(method for method in cells if method not in METHODS)
    return Comparison(known + others, list(schemes), cells, reference)


def title(method: str) -> str:
    """The name of a method as readers see it.

    >>> title("quant-trim"), title("something else")
    ('Quant-Trim', 'something else')
    """
    return METHODS.get(method, method)


def measured(seeds: dict[int | None, Record], key: str) -> dict[int | None, float]:
    """The values under `key` by seed, where there is one."""
    return {seed: record[key] for seed, record in seeds.items() if record.get(key) is not None}


def difference(minuend: dict[int | None, float], subtrahend: dict[int | None, float]) -> list[float]:
    """Paired differences over the seeds that both have.

    >>> difference({0: 5.0, 1: 7.0}, {1: 4.0, 2: 0.0})
    [3.0]
    """
    return [value - subtrahend[seed] for seed, value in minuend.items() if seed in subtrahend]


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1), None for a single value.

    >>> spread([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    array = np.asarray(list(values), np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None
