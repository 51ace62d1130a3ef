"""The records of a study arranged for comparison: by task, method, place of deployment and seed.

Simulators run on fewer images than the rest. So that all places can be averaged and ranked, the accuracy of a
deployment is that of its float network on all images less what the deployment loses on its own images; where
they are all images, it is just its accuracy.

Means over seeds and their 95 % intervals, of single methods and of paired differences.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.configs.methods import BASELINES, METHODS
from experiments.paper.rows import DEPLOYMENT, SEARCH, STRUCTURE, TRAINING, key_of
from qt_jax import records
from qt_jax.errors import InvalidInput
from qt_jax.records import Record
from qt_jax.reporting.pivot import REFERENCE, Row, precision

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over `n` seeds; `half` is half the width of its interval, None for a single seed."""

    mean: float
    half: float | None
    n: int

    @property
    def positive(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.half is not None and self.mean > self.half


def interval(values: Iterable[float], level: float = LEVEL) -> Estimate | None:
    """The mean of independent values and its t-interval: mean ± t_{n-1, (1 + level) / 2} s / √n.

    None where there are no values.

    >>> found = interval([1.0, 3.0])
    >>> found.mean, round(found.half, 3)
    (2.0, 12.706)
    """
    array = np.asarray(list(values), np.float64)
    n = len(array)
    if n == 0:
        return None
    if n == 1:
        return Estimate(float(array[0]), None, 1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n)
    return Estimate(float(array.mean()), float(half), n)


def paired(ahead: Mapping[int, float], behind: Mapping[int, float], level: float = LEVEL) -> Estimate | None:
    """The interval of the mean difference over the seeds that both have.

    >>> paired({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 6.0})
    Estimate(mean=1.0, half=0.0, n=2)
    """
    return interval((ahead[seed] - behind[seed] for seed in ahead if seed in behind), level)


def written(estimate: Estimate | None, scale: float = 1.0, digits: int = 2, signed: bool = False) -> str:
    """`mean ± half` as text, or the mean alone for a single seed, or a dash.

    >>> written(Estimate(0.8512, 0.0034, 3), 100), written(Estimate(-0.01, None, 1), 100, signed=True)
    ('85.12 ± 0.34', '−1.00')
    """
    if estimate is None:
        return "–"
    mean = round(scale * estimate.mean, digits) + 0.0  # no negative zero
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", "−")
    return text if estimate.half is None else f"{text} ± {scale * estimate.half:.{digits}f}"


Seeds = dict[int, float]

FLOAT, PUBLISHED, RECOMMENDED = "float", "quant-trim", "recommended"


class Evidence(NamedTuple):
    """`cells[task][method][place][seed]` is a deployment record; the others are records as they were."""

    cells: dict[str, dict[str, dict[Row, dict[int, Record]]]]
    training: list[Record]
    structure: list[Record]
    search: list[Record]

    @property
    def tasks(self) -> list[str]:
        return list(self.cells)

    def methods(self, task: str, table: str = BASELINES) -> list[str]:
        """The methods of a table that the task has records of, in the order of the registry."""
        mine = self.cells[task]
        return [name for name in METHODS if name in mine and table in METHODS[name].tables]

    def places(self, task: str, methods: Iterable[str]) -> list[Row]:
        """Where any of these methods was deployed: by backend, from many bits to few."""
        found = {}
        for method in methods:
            for place, seeds in self.cells[task][method].items():
                record = next(iter(seeds.values()))
                bits = (record.get("weight_bits") or 0, record.get("activation_bits") or 0)
                found[place] = (place.backend != REFERENCE.backend, place.backend, *(-b for b in bits), place)
        return sorted(found, key=found.__getitem__)

    def seeds(self, task: str, method: str, place: Row) -> dict[int, Record]:
        """The records of one cell by seed, in the order of the seeds."""
        found = self.cells[task].get(method, {}).get(place, {})
        return {seed: found[seed] for seed in sorted(found)}

    def accuracy(self, task: str, method: str, place: Row) -> Seeds:
        """Accuracy by seed, as the module defines it: a fraction."""
        float_ = self.seeds(task, method, REFERENCE)
        return {
            seed: score(float_[seed]) - (reference_score(record) - score(record))
            for seed, record in self.seeds(task, method, place).items()
            if score(record) is not None and seed in float_
        }

    def metric(self, task: str, method: str, place: Row, key: str) -> Seeds:
        """What the records say under `key`, by seed; accuracy under "accuracy"."""
        if key == "accuracy":
            return self.accuracy(task, method, place)
        found = self.seeds(task, method, place)
        return {seed: record[key] for seed, record in found.items() if record.get(key) is not None}


def read(folder: Path) -> Evidence:
    """The evidence in a folder of results: rows that training.jsonl, which is written last, knows of.

    Raises:
      InvalidInput: the seeds of a method were trained with different configs.
    """
    deployment, training, structure, search = (
        records.read(folder / name) for name in (DEPLOYMENT, TRAINING, STRUCTURE, SEARCH)
    )
    configs: dict[tuple[str, str], str] = {}
    for record in training:
        row = (record["task"], record["method"])
        config = json.dumps(record["config"] | {"seed": None}, sort_keys=True)
        if configs.setdefault(row, config) != config:
            raise InvalidInput(
                f"{folder / TRAINING}: the seeds of {' '.join(row)} were trained with different configs, one "
                f"with {configs[row]}, one with {config}. Run the study again: it redoes what is not of the "
                "present config."
            )
    complete = {key_of(record) for record in training}
    kept = ([r for r in rows if key_of(r) in complete] for rows in (deployment, training, structure))
    return arrange(*kept, search)


def arrange(
    deployment: Sequence[Record],
    training: Sequence[Record] = (),
    structure: Sequence[Record] = (),
    search: Sequence[Record] = (),
) -> Evidence:
    """Records in an order that does not depend on the one in which rows have ended.

    Tasks come as the records of training, sorted by name.
    """
    cells: dict[str, dict[str, dict[Row, dict[int, Record]]]] = {}
    for record in sorted(deployment, key=lambda r: (r["task"], r["method"], r["seed"])):
        place = Row(record["backend"], record["scheme"], record["runtime"])
        by_method = cells.setdefault(record["task"], {}).setdefault(record["method"], {})
        by_method.setdefault(place, {})[record["seed"]] = record

    def known(rows: Sequence[Record]) -> list[Record]:
        kept = [row for row in rows if row["method"] in METHODS]
        order = list(METHODS)
        return sorted(
            kept, key=lambda r: (r["task"], order.index(r["method"]), r["seed"], r.get("factor", 0))
        )

    return Evidence(cells, known(training), known(structure), known(search))


def score(record: Mapping) -> float | None:
    """A record's accuracy: the mean intersection over union of a segmentation, else top-1.

    >>> score({"top1": 0.5, "miou": None})
    0.5
    """
    return record["top1"] if record.get("miou") is None else record["miou"]


def reference_score(record: Mapping) -> float:
    """The float network's accuracy on the same images."""
    return record["reference_top1"] if record.get("miou") is None else record["reference_miou"]


GROUPS: dict[str, Callable[[Record], bool]] = {
    "FP32": lambda r: (r["backend"], r["scheme"], r["runtime"]) == tuple(REFERENCE),
    "INT8 pt": lambda r: precision({0: r}) == "INT8" and not r["per_channel"],
    "INT8 pc": lambda r: precision({0: r}) == "INT8" and bool(r["per_channel"]),
    "INT4 pt": lambda r: precision({0: r}) == "INT4" and not r["per_channel"],
    "INT4 pc": lambda r: precision({0: r}) == "INT4" and bool(r["per_channel"]),
}
"""Groups of places: by the bits of weights, and one weight scale a tensor or a channel.

INT8 has 8-bit activations, INT4 any; both on integer grids, in all layers.
"""


def common_places(evidence: Evidence, task: str, methods: Sequence[str], group: str) -> list[Row]:
    """The places of a group at which every method has an accuracy for each of its seeds.

    A method without any in the group has no say.
    """
    held = []
    for method in methods:
        trained = set(evidence.seeds(task, method, REFERENCE))
        found = {
            place: set(evidence.accuracy(task, method, place))
            for place in evidence.cells[task][method]
            if all(map(GROUPS[group], evidence.seeds(task, method, place).values()))
        }
        if any(found.values()):
            held.append({place for place, seeds in found.items() if seeds == trained})
    return [place for place in evidence.places(task, methods) if held and place in set.intersection(*held)]


def mean_over(evidence: Evidence, task: str, method: str, places: Sequence[Row], key: str) -> Seeds:
    """The mean over places by seed; empty where a place is missing."""
    found = [evidence.metric(task, method, place, key) for place in places]
    seeds = set.intersection(*map(set, found)) if found else set()
    return {seed: sum(values[seed] for values in found) / len(found) for seed in sorted(seeds)}


def worst_over(evidence: Evidence, task: str, method: str, places: Sequence[Row]) -> Seeds:
    """The accuracy at the place that is worst for each seed."""
    found = [evidence.accuracy(task, method, place) for place in places]
    seeds = set.intersection(*map(set, found)) if found else set()
    return {seed: min(values[seed] for values in found) for seed in sorted(seeds)}
