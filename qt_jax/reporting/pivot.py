"""Arrange records for comparison: by method and scheme, or by deployed row and network, each by seed.

`compare` arranges the records of one task and model by method and scheme. `arrange` arranges deployment
records with one row per compiled model and runtime, and one column per network. These rules hold for both:

- The score of a record is its `value` in its `metric`, or its `top1` where it names no metric. Records of a
  test set without labels have no score. They are compared by SQNR instead.
- The drop of a row is what it lost: its `reference_value` minus its `value`, or the reverse for a metric of
  which less is better. So more is always worse. Both are of the same images. Simulators run on fewer images,
  so neither term is ever taken from another record.
- A network is a column. Where two runs hold networks of the same task, model, method and seed, the run is
  part of the column too.
- INT8 rows have 8-bit weights and 8-bit activations. INT4 rows have 4-bit weights and any activations. Both
  are on integer grids. Floats, block exponents, and 4-bit matmuls beside wider convolutions are neither, and
  nor is a row in which nothing was quantized. Only rows of status ok count. A row of which a part stayed in
  float belongs to its group, and `share` says how large the part on integers is.
- Emulated conventions are grids that a vendor describes, run by a program of ours. They are no toolchain of a
  vendor, and form groups of their own.
- The spread of a group is its largest drop minus its smallest. It is taken of drops, because top-1 on 500
  images and on 10,000 cannot be subtracted.
- The gain is by how much Quant-Trim's score is better than its float twin's, for the same seed, data and
  number of images.
"""

import math
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

FRACTIONS = METRICS | {"top5": "top-5", "accuracy": "accuracy", "auc": "AUC"}
"""Metrics that are fractions, shown in % and in points, and their names in tables. Others have units of their
own."""

SIGNIFICANT = 4
"""Significant digits of the float model's score where it is no fraction. Its drops have as many decimals."""

CONVENTION = "emulated convention"
"""The `kind` of rows that emulate a grid without any toolchain of a vendor."""

NOTHING_QUANTIZED = "nothing was quantized"
"""Beginning of the reason of a row that ran wholly in float, whose status is invalid."""

ALL_FLOAT = "all float"
"""Stands for the status of such a row in tables and figures."""

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
    """Return the values under `key` by seed, for the seeds that have one and ended ok.

    >>> measured({0: {"top1": 0.5, "status": "ok"}, 1: {"top1": 0.5, "status": "invalid"}}, "top1")
    {0: 0.5}
    """
    return {
        seed: record[key]
        for seed, record in seeds.items()
        if record.get(key) is not None and ended_well(record)
    }


def ended_well(record: Record) -> bool:
    """Tell whether the numbers of a record count: its status is ok, or it has none."""
    return record.get("status", "ok") == "ok"


def score(record: Record) -> float | None:
    """Return what the labels say about a record, in its metric; None without labels or without success.

    >>> score({"top1": 0.5}), score({"metric": "auc", "value": 0.9, "top1": 0.5}), score({"metric": None})
    (0.5, 0.9, None)
    """
    if not ended_well(record):
        return None
    return record.get("value") if record.get("metric") else record.get("top1")


def lost(record: Record) -> float | None:
    """Return by how much a record is worse than the float model on the same images; less than 0 is better.

    >>> lost({"top1": 0.5, "reference_top1": 0.75})
    0.25
    >>> lost({"metric": "mean_error", "value": 3.0, "reference_value": 2.0, "larger_is_better": False})
    1.0
    """
    after = score(record)
    before = record.get("reference_value") if record.get("metric") else record.get("reference_top1")
    if before is None or after is None:
        return None
    return before - after if _larger_is_better(record) else after - before


def _larger_is_better(record: Record) -> bool:
    return record.get("larger_is_better") is not False


def scores(seeds: Seeds) -> dict[int | None, float]:
    """Return the scores by seed, for the seeds that have one."""
    return {seed: value for seed, record in seeds.items() if (value := score(record)) is not None}


class Metric(NamedTuple):
    """Say how a network is judged by labels, and how such numbers are written.

    Attributes:
      name: Value of the records' key `metric`.
      title: Its name in tables.
      scale: Factor of the numbers that are shown: 100 for fractions.
      digits: Decimals of the numbers that are shown.
    """

    name: str
    title: str
    scale: float = 100.0
    digits: int = 2

    @property
    def fraction(self) -> bool:
        return self.name in FRACTIONS

    @property
    def loss(self) -> str:
        """Heading of what a row lost."""
        return "drop" if self.fraction else "worse by"


def metric_of(records: Iterable[Record]) -> Metric | None:
    """Return the metric of the records of one network; None for a test set without labels.

    Records that hold neither a score nor an SQNR say nothing. Their metric is top-1, as it usually is.

    >>> metric_of([{"metric": "vision:edges", "value": 3.0, "reference_value": 12.5}])
    Metric(name='vision:edges', title='edges', scale=1.0, digits=2)
    """
    records = list(records)
    name = next((record["metric"] for record in records if record.get("metric")), None)
    if name is None:
        labelled = any(record.get("top1") is not None for record in records)
        if not labelled and any(
            record.get("sqnr_db") is not None or record.get("fidelity") for record in records
        ):
            return None
        name = "top1"
    if name in FRACTIONS:
        pixels = name == "top1" and any(record.get("miou") is not None for record in records)
        return Metric(name, "pixel accuracy" if pixels else FRACTIONS[name])
    values = [record.get(key) for record in records for key in ("reference_value", "value")]
    typical = next((abs(value) for value in values if value), 1.0)
    digits = SIGNIFICANT - 1 - math.floor(math.log10(typical))
    return Metric(name, name.rpartition(":")[2].replace("_", " "), 1.0, min(max(digits, 0), 12))


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

    def records(self, columns: Iterable[Column] | None = None) -> list[Record]:
        """Return the records of some columns, or of all."""
        chosen = self.columns if columns is None else columns
        return [r for column in chosen for seeds in self.cells[column].values() for r in seeds.values()]

    def metric(self, column: Column) -> Metric | None:
        """Return the metric of a column; None without labels. Networks of one metric share its digits."""
        own = metric_of(self.records([column]))
        if own is None or own.fraction:
            return own
        others = (metric_of(self.records([other])) for other in self.columns)
        return own._replace(digits=max(m.digits for m in others if m is not None and m.name == own.name))

    def by_metric(self) -> dict[Metric | None, list[Column]]:
        """Return the columns of each metric."""
        found: dict[Metric | None, list[Column]] = {}
        for column in self.columns:
            found.setdefault(self.metric(column), []).append(column)
        return found

    def in_points(self) -> bool:
        """Tell whether all networks are judged by fractions, so that their drops share a scale."""
        return all(metric is not None and metric.fraction for metric in self.by_metric())


class Group(NamedTuple):
    """Summarize the rows of one precision: their number, the worst row, and the spread.

    Attributes:
      size: Number of rows.
      worst: Row of the largest drop.
      drop: Its drop. Without labels this is minus its SQNR in dB, so that more is worse here too.
      spread: Largest drop minus smallest.
    """

    size: int
    worst: Row
    drop: float
    spread: float


def arrange(records: Sequence[Record]) -> DeploymentTable:
    """Arrange records by row, column and seed. Of two records for the same cell, the later one counts.

    Rows are sorted by backend (onnxruntime first, the others by name, emulated conventions last), from many
    bits to few, then by name.
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
    conventions = set()
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
        if record.get("kind") == CONVENTION:
            conventions.add(row)
    rows = sorted(
        bits,
        key=lambda row: (
            row in conventions,
            row.backend != REFERENCE.backend,
            row.backend,
            *(-b for b in bits[row]),
            row,
        ),
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
    """Return what was lost against the float model on the same images, for each seed that knows it.

    >>> drops({0: {"reference_top1": 0.75, "top1": 0.5}, 1: {"top1": 0.9}})
    [0.25]
    """
    return [value for record in seeds.values() if (value := lost(record)) is not None]


def harm(seeds: Seeds, metric: Metric | None) -> float | None:
    """Return how bad a cell is, as a mean over seeds: its drop, or without labels minus its SQNR in dB.

    Outputs that equal those of the float network have an infinite SQNR.

    >>> harm({0: {"sqnr_db": 30.0}}, None)
    -30.0
    """
    if metric is not None:
        values = drops(seeds)
        return spread(values)[0] if values else None
    found = [ratio for record in seeds.values() if (ratio := closeness_db(record)) is not None]
    return -spread(found)[0] if found and math.isfinite(sum(found)) else -min(found) if found else None


def closeness_db(record: Record) -> float | None:
    """Return how close the judged outputs of a row are to those of the float network, in dB.

    It is the lowest SQNR. Outputs whose shape differs for some samples, and outputs of integers beside
    others, count with -10 log10 of the share that differs. It is infinite where nothing differs.

    >>> closeness_db({"status": "ok", "sqnr_db": 30.0, "fidelity": [{"equal": 0.9}]})
    10.0
    """
    if not ended_well(record):
        return None
    found = [] if record.get("sqnr_db") is None else [record["sqnr_db"]]
    for item in record.get("fidelity") or ():
        n = record.get("n") or 1
        shares = [1 - item["equal"]] if found and item.get("equal") is not None else []
        shares += [item["other_shape"] / n] if item.get("other_shape") else []
        found += [-10 * math.log10(share) for share in shares if share > 0]
    if not found and is_exact(record):
        return math.inf
    return round(min(found), 9) + 0 if found else None


def is_exact(record: Record) -> bool:
    """Tell whether the judged outputs of a row equal those of the float network.

    >>> is_exact({"fidelity": [{"largest_error": 0.0}]}), is_exact({})
    (True, False)
    """
    compared = record.get("fidelity") or []
    return bool(compared) and all(
        item.get("largest_error") == 0 and not item.get("other_shape") for item in compared
    )


def statuses(seeds: Seeds) -> list[str]:
    """Return the statuses of the seeds, each once, without ok.

    >>> statuses({0: {"status": "ok"}, 1: {"status": "refused"}})
    ['refused']
    """
    return sorted({_outcome(record) for record in seeds.values()} - {"ok"})


def _outcome(record: Record) -> str:
    return ALL_FLOAT if is_all_float(record) else record["status"]


def is_all_float(record: Record) -> bool:
    """Tell whether a row ran wholly in float, although its scheme says otherwise."""
    return record["status"] == "invalid" and str(record.get("reason") or "").startswith(NOTHING_QUANTIZED)


def share(seeds: Seeds) -> str | None:
    """Return how many of a row's layers with products were quantized, such as "8 of 9"; None if unknown.

    Such layers are convolutions, matrix products and recurrent cells. Where seeds differ, all are named.

    >>> share({0: {"products": {"quantized": 8, "total": 9}}})
    '8 of 9'
    """
    found = [record["products"] for record in seeds.values() if record.get("products")]
    return ", ".join(dict.fromkeys(f"{each['quantized']} of {each['total']}" for each in found)) or None


def partly_float(seeds: Seeds) -> bool:
    """Tell whether a row left some layers with products in float.

    >>> partly_float({0: {"products": {"quantized": 8, "total": 9}}})
    True
    """
    found = [record["products"] for record in seeds.values() if record.get("products")]
    return any(0 < each["quantized"] < each["total"] for each in found)


def is_convention(seeds: Seeds) -> bool:
    """Tell whether a cell emulates a grid, and speaks for no toolchain."""
    return any(record.get("kind") == CONVENTION for record in seeds.values())


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
        products = record.get("products") or {}
        if products.get("total") and not products.get("quantized"):
            return None
        if record.get("weight_bits") == 4:
            return "INT4"
        if record.get("weight_bits") == record.get("activation_bits") == 8:
            return "INT8"
    return None


def group(deployment: DeploymentTable, column: Column, name: str, conventions: bool = False) -> Group | None:
    """Summarize the rows of one precision that have a drop, or an SQNR without labels; None for no rows.

    Args:
      deployment: Table that holds the rows.
      column: Network.
      name: INT8 or INT4.
      conventions: Summarize emulated conventions instead of vendors' rows.
    """
    metric = deployment.metric(column)
    found = {
        row: value
        for row, seeds in deployment.cells[column].items()
        if is_convention(seeds) == conventions
        and precision(seeds) == name
        and (value := harm(seeds, metric)) is not None
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
    """Return the records of two cells that can be subtracted: same metric, seed, data, number of images.

    >>> one, two = {"top1": 0.5, "n": 500}, {"top1": 0.5, "n": 9}
    >>> len(comparable({0: one}, {0: one})), len(comparable({0: one}, {0: two}))
    (1, 0)
    """
    first, second = scores(ahead), scores(behind)
    both = [(ahead[seed], behind[seed]) for seed in first if seed in second]
    return [(a, b) for a, b in both if _test(a) == _test(b)]


def _test(record: Record) -> tuple:
    """Return what two scores must share to be comparable."""
    return record.get("metric") or "top1", record.get("n"), record.get("data")


def leads(both: Iterable[tuple[Record, Record]]) -> list[float]:
    """Return by how much the first record of each comparable pair is better than the second.

    >>> leads([({"top1": 0.75}, {"top1": 0.5})])
    [0.25]
    """
    found = []
    for first, second in both:
        one, two = score(first), score(second)
        assert one is not None and two is not None, "comparable records have a score"
        found.append(one - two if _larger_is_better(first) else two - one)
    return found


def count_statuses(deployment: DeploymentTable, column: Column) -> Counter[str]:
    """Count the records of a column by status."""
    return Counter(
        record["status"] for seeds in deployment.cells[column].values() for record in seeds.values()
    )
