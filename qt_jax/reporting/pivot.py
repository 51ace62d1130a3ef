"""Arrange records for comparison: by method and scheme, or by deployed row and network, each by seed.

`compare` arranges the records of one task and model by method and scheme. `arrange` arranges deployment
records with one row per compiled model and runtime, and one column per network. These rules hold for both:

- The drop of a row is `reference_top1 - top1`: the float model in onnxruntime and the row on the same images.
  Simulators run on fewer images, so neither term is ever taken from another record.
- A network is a column. Where two runs hold networks of the same task, model, method and seed, the run is
  part of the column too.
- INT8 rows have 8-bit weights and 8-bit activations. INT4 rows have 4-bit weights and any activations. Both
  are on integer grids in all layers. Floats, block exponents, and 4-bit matmuls beside wider convolutions
  are neither. Only rows of status ok count.
- The spread of a group is its largest drop minus its smallest. It is taken of drops, because top-1 on 500
  images and on 10,000 cannot be subtracted.
- The gain is Quant-Trim's top-1 minus its float twin's, for the same seed, data and number of images.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.records import Record

METHOD_TITLES = {"quant-trim": "Quant-Trim", "float": "float twin"}
"""Known methods and their titles, in the order in which tables and figures show them. Others follow."""

METRICS = {"top1": "top-1", "miou": "mIoU"}
"""Metrics that a table or figure can show, and their names there. In segmentation top-1 is pixel accuracy."""


Seeds = dict[int | None, Record]
"""Maps a seed to its record."""


class Comparison(NamedTuple):
    """Hold records by method, scheme and seed.

    Attributes:
      methods, schemes: Methods and schemes in the order to show them.
      cells: `cells[method][scheme][seed]` is a record.
      reference: Scheme that drops are counted from: FP32 of the backend that ran first.
    """

    methods: list[str]
    schemes: list[str]
    cells: dict[str, dict[str, Seeds]]
    reference: str


def compare(records: Sequence[Record]) -> Comparison:
    """Arrange records of one task and model. Of two records for the same cell, the later one counts.

    A scheme is called by its name. Where there are several backends, the backend's name precedes it.

    Raises:
      InvalidInput: There are no records, none has the scheme fp32, or there are several tasks or models.

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
    cells: dict[str, dict[str, Seeds]] = {}
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
    known = [method for method in METHOD_TITLES if method in cells]
    others = sorted(method for method in cells if method not in METHOD_TITLES)
    return Comparison(known + others, list(schemes), cells, reference)


def title(method: str) -> str:
    """Return the name of a method as readers see it.

    >>> title("quant-trim"), title("something else")
    ('Quant-Trim', 'something else')
    """
    return METHOD_TITLES.get(method, method)


def measured(seeds: Seeds, key: str) -> dict[int | None, float]:
    """Return the values under `key` by seed, for the seeds that have one."""
    return {seed: record[key] for seed, record in seeds.items() if record.get(key) is not None}


def difference(minuend: dict[int | None, float], subtrahend: dict[int | None, float]) -> list[float]:
    """Return the paired differences over the seeds that both have.

    >>> difference({0: 5.0, 1: 7.0}, {1: 4.0, 2: 0.0})
    [3.0]
    """
    return [value - subtrahend[seed] for seed, value in minuend.items() if seed in subtrahend]


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (ddof 1); the latter is None for a single value.

    >>> spread([1.0, 3.0])
    (2.0, 1.4142135623730951)
    """
    array = np.asarray(list(values), np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


class Row(NamedTuple):
    """Name a compiled model and its runtime; a part is empty where a record does not say it."""

    backend: str
    scheme: str
    runtime: str

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


class Column(NamedTuple):
    """Name a deployed network."""

    task: str
    model: str
    method: str
    run: str = ""
    """Given only where two networks of one task, model, method and seed would otherwise be one."""


REFERENCE = Row("onnxruntime", "fp32", "reference")
"""Row of the float model itself."""


class DeploymentTable(NamedTuple):
    """Hold deployment records by network, row and seed.

    Attributes:
      rows, columns: Rows and columns in the order to show them.
      cells: `cells[column][row][seed]` is a record.
    """

    rows: list[Row]
    columns: list[Column]
    cells: dict[Column, dict[Row, Seeds]]

    def seeds(self, column: Column, row: Row) -> Seeds:
        """Return the records of one cell; none where nothing was tried."""
        return self.cells[column].get(row, {})

    def name(self, column: Column) -> str:
        """Return the title of a column, which leaves out what all columns share but keeps the method."""
        parts = [title(column.method)]
        for index in (3, 1, 0):
            if len({other[index] for other in self.columns}) > 1 and column[index] not in parts:
                parts.insert(0, column[index])
        return " ".join(part for part in parts if part) or "network"


class Group(NamedTuple):
    """Summarize the rows of one precision: their number, the row with the largest drop, and the spread."""

    size: int
    worst: Row
    drop: float
    spread: float


def arrange(records: Sequence[Record]) -> DeploymentTable:
    """Arrange records by row, column and seed. Of two records for the same cell, the later one counts.

    Rows are sorted by backend (onnxruntime first, the others by name), from many bits to few, then by name.
    Columns are sorted by task and model, with Quant-Trim and its twin before other methods.

    Raises:
      InvalidInput: There are no records, or one lacks its backend, scheme or status.

    >>> records = [{"backend": "b", "scheme": s, "status": "ok", "weight_bits": w}
    ...            for s, w in (("int8", 8), ("fp32", 32))]
    >>> [str(row) for row in arrange(records).rows]
    ['b fp32', 'b int8']
    """
    if not records:
        raise InvalidInput("There are no records to report: did the run end before its first row?")
    ambiguous = _ambiguous(records)
    cells: dict[Column, dict[Row, Seeds]] = {}
    bits: dict[Row, tuple[int, int]] = {}
    for record in records:
        if missing := [key for key in ("backend", "scheme", "status") if not record.get(key)]:
            raise InvalidInput(
                f"A record without {' and '.join(missing)} is not a deployment record: {record}"
            )
        row = Row(record["backend"], record["scheme"], record.get("runtime") or "")
        column = _column(record)
        column = column._replace(run=str(record.get("run") or "")) if column[:2] in ambiguous else column
        cells.setdefault(column, {}).setdefault(row, {})[record.get("seed")] = record
        bits[row] = (record.get("weight_bits") or 0, record.get("activation_bits") or 0)
    rows = sorted(
        bits,
        key=lambda row: (row.backend != REFERENCE.backend, row.backend, *(-b for b in bits[row]), row),
    )
    known = list(METHOD_TITLES)
    columns = sorted(
        cells,
        key=lambda c: (c.task, c.model, c.run, known.index(c.method) if c.method in known else 2, c.method),
    )
    return DeploymentTable(rows, columns, cells)


def _column(record: Record) -> Column:
    return Column(*(str(record.get(key) or "") for key in ("task", "model", "method")))


def _ambiguous(records: Sequence[Record]) -> set[tuple[str, ...]]:
    """Return the (task, model) of which two runs hold different networks of the same method and seed."""
    runs: dict[tuple, set] = {}
    for record in records:
        cell = (_column(record), record.get("seed"))
        runs.setdefault(cell, set()).add((record.get("run"), record.get("checkpoint")))
    several = {cell: {run for run, _ in found} for cell, found in runs.items()}
    return {column[:2] for (column, _), found in several.items() if len(found) > 1}


def drops(seeds: Seeds) -> list[float]:
    """Return the top-1 lost against the float model on the same images, one fraction per seed that has both.

    >>> drops({0: {"reference_top1": 0.75, "top1": 0.5}, 1: {"top1": 0.9}})
    [0.25]
    """
    both = [(record.get("reference_top1"), record.get("top1")) for record in seeds.values()]
    return [before - after for before, after in both if before is not None and after is not None]


def statuses(seeds: Seeds) -> list[str]:
    """Return the statuses of the seeds, each once, without ok.

    >>> statuses({0: {"status": "ok"}, 1: {"status": "refused"}})
    ['refused']
    """
    return sorted({record["status"] for record in seeds.values()} - {"ok"})


def images(seeds: Seeds) -> list[int]:
    """Return the different numbers of images of a cell."""
    return sorted({record["n"] for record in seeds.values() if record.get("n")})


def precision(seeds: Seeds) -> str | None:
    """Return INT8 or INT4, as the module defines them, or None for another precision.

    >>> precision({0: {"weight_bits": 4, "activation_bits": 16}})
    'INT4'
    """
    for record in seeds.values():
        if record.get("number_format", "integer") != "integer" or record.get("layers", "all") != "all":
            return None
        if record.get("weight_bits") == 4:
            return "INT4"
        if record.get("weight_bits") == record.get("activation_bits") == 8:
            return "INT8"
    return None


def group(deployment: DeploymentTable, column: Column, name: str) -> Group | None:
    """Summarize the rows of one precision that have a drop; None if there are none."""
    found = {
        row: spread(values)[0]
        for row, seeds in deployment.cells[column].items()
        if precision(seeds) == name and (values := drops(seeds))
    }
    if not found:
        return None
    worst = max(found, key=found.__getitem__)
    return Group(len(found), worst, found[worst], found[worst] - min(found.values()))


def pairs(deployment: DeploymentTable) -> list[tuple[Column, Column]]:
    """Return each Quant-Trim column with that of its float twin, where both are there."""
    ahead, behind = METHOD_TITLES
    twins = [(c, c._replace(method=behind)) for c in deployment.columns if c.method == ahead]
    return [pair for pair in twins if pair[1] in deployment.cells]


def comparable(ahead: Seeds, behind: Seeds) -> list[tuple[Record, Record]]:
    """Return the records of two cells that can be subtracted: same seed, same data, same number of images.

    >>> one, two = {"top1": 0.5, "n": 500}, {"top1": 0.5, "n": 9}
    >>> len(comparable({0: one}, {0: one})), len(comparable({0: one}, {0: two}))
    (1, 0)
    """
    first, second = measured(ahead, "top1"), measured(behind, "top1")
    both = [(ahead[seed], behind[seed]) for seed in first if seed in second]
    return [(a, b) for a, b in both if all(a.get(key) == b.get(key) for key in ("n", "data"))]


def count_statuses(deployment: DeploymentTable, column: Column) -> Counter[str]:
    """Count the records of a column by status."""
    return Counter(
        record["status"] for seeds in deployment.cells[column].values() for record in seeds.values()
    )
