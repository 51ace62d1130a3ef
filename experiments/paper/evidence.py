"""Arrange the records of a study by task, method, deployment and seed, and estimate means over seeds.

A deployment is a backend, a scheme and a runtime (`qt_jax.reporting.pivot.Row`). Simulators run on fewer
images than the other backends. So that all deployments can be averaged and ranked, the accuracy of a
deployment is that of its float network on all images minus what the deployment loses on its own images. Where
its own images are all images, this is just its accuracy.

Means come with their 95 % intervals, both for single methods and for paired differences.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.configs.methods import BASELINES, METHODS
from experiments.paper.rows import DEPLOYMENT, SEARCH, STRUCTURE, TRAINED, TRAINING, key_of
from qt_jax import records
from qt_jax.errors import InvalidInput
from qt_jax.records import Record
from qt_jax.reporting.pivot import REFERENCE, Row, precision

PUBLISHED, RECOMMENDED = "quant-trim", "recommended"
"""Names of the methods that tables and figures single out, beside `FLOAT`."""

LEVEL = 0.95
"""Confidence level of intervals."""

GROUPS: dict[str, Callable[[Record], bool]] = {
    "FP32": lambda r: (r["backend"], r["scheme"], r["runtime"]) == tuple(REFERENCE),
    "INT8 pt": lambda r: precision({0: r}) == "INT8" and not r["per_channel"],
    "INT8 pc": lambda r: precision({0: r}) == "INT8" and bool(r["per_channel"]),
    "INT4 pt": lambda r: precision({0: r}) == "INT4" and not r["per_channel"],
    "INT4 pc": lambda r: precision({0: r}) == "INT4" and bool(r["per_channel"]),
}
"""Groups of deployments: by the bits of weights, with one weight scale per tensor or per channel.

INT8 has 8-bit activations, INT4 has any. Both are on integer grids, in all layers.
"""

SeedValues = dict[int, float]
"""Maps a seed to a number."""


class Evidence(NamedTuple):
    """Hold the records of a study.

    Attributes:
      deployed: `deployed[task][method][deployment][seed]` is a deployment record.
      training: The records of training.jsonl.
      structure: The records of structure.jsonl.
      search: The records of search.jsonl.
      trained: The records of trained.jsonl: networks of `experiments.accelerator`, deployed or not.
    """

    deployed: dict[str, dict[str, dict[Row, dict[int, Record]]]]
    training: list[Record]
    structure: list[Record]
    search: list[Record]
    trained: list[Record]

    @property
    def tasks(self) -> list[str]:
        """Return the names of the tasks."""
        return list(self.deployed)

    def methods(self, task: str, table: str = BASELINES) -> list[str]:
        """Return the methods of a table that the task has records of, in the order of `METHODS`."""
        mine = self.deployed[task]
        return [name for name in METHODS if name in mine and table in METHODS[name].tables]

    def deployments(self, task: str, methods: Iterable[str]) -> list[Row]:
        """Return where any of these methods was deployed: by backend, from many bits to few."""
        found = {}
        for method in methods:
            for deployment, seeds in self.deployed[task][method].items():
                record = next(iter(seeds.values()))
                bits = (record.get("weight_bits") or 0, record.get("activation_bits") or 0)
                found[deployment] = (
                    deployment.backend != REFERENCE.backend,
                    deployment.backend,
                    *(-b for b in bits),
                    deployment,
                )
        return sorted(found, key=found.__getitem__)

    def seeds(self, task: str, method: str, deployment: Row) -> dict[int, Record]:
        """Return the records of a method at a deployment by seed, in the order of the seeds."""
        found = self.deployed[task].get(method, {}).get(deployment, {})
        return {seed: found[seed] for seed in sorted(found)}

    def accuracy(self, task: str, method: str, deployment: Row) -> SeedValues:
        """Return the accuracy by seed, as the module defines it, as a fraction."""
        reference = self.seeds(task, method, REFERENCE)
        return {
            seed: score(reference[seed]) - (reference_score(record) - score(record))
            for seed, record in self.seeds(task, method, deployment).items()
            if score(record) is not None and seed in reference
        }

    def metric(self, task: str, method: str, deployment: Row, key: str) -> SeedValues:
        """Return the values of the records under `key` by seed; under "accuracy" it is the accuracy."""
        if key == "accuracy":
            return self.accuracy(task, method, deployment)
        found = self.seeds(task, method, deployment)
        return {seed: record[key] for seed, record in found.items() if record.get(key) is not None}


def read(folder: Path) -> Evidence:
    """Read the evidence in a folder of results: the rows in training.jsonl, which is written last.

    Raises:
      InvalidInput: The seeds of a method were trained with different configs.
    """
    deployment, training, structure, search, trained = (
        records.read(folder / name) for name in (DEPLOYMENT, TRAINING, STRUCTURE, SEARCH, TRAINED)
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
    return arrange(*kept, search, trained)


def arrange(
    deployment: Sequence[Record],
    training: Sequence[Record] = (),
    structure: Sequence[Record] = (),
    search: Sequence[Record] = (),
    trained: Sequence[Record] = (),
) -> Evidence:
    """Arrange records in an order that does not depend on the one in which rows have ended.

    Tasks, and the records of training, are sorted by the name of the task.
    """
    deployed: dict[str, dict[str, dict[Row, dict[int, Record]]]] = {}
    for record in sorted(deployment, key=lambda r: (r["task"], r["method"], r["seed"])):
        key = Row(record["backend"], record["scheme"], record["runtime"])
        by_method = deployed.setdefault(record["task"], {}).setdefault(record["method"], {})
        by_method.setdefault(key, {})[record["seed"]] = record

    def known(rows: Sequence[Record]) -> list[Record]:
        kept = [row for row in rows if row["method"] in METHODS]
        order = list(METHODS)
        return sorted(
            kept, key=lambda r: (r["task"], order.index(r["method"]), r["seed"], r.get("factor", 0))
        )

    return Evidence(deployed, *map(known, (training, structure, search, trained)))


def score(record: Mapping) -> float | None:
    """Return a record's accuracy: mean intersection over union for segmentation, otherwise top-1.

    >>> score({"top1": 0.5, "miou": None})
    0.5
    """
    return record["top1"] if record.get("miou") is None else record["miou"]


def reference_score(record: Mapping) -> float:
    """Return the float network's accuracy on the same images."""
    return record["reference_top1"] if record.get("miou") is None else record["reference_miou"]


def common_deployments(evidence: Evidence, task: str, methods: Sequence[str], group: str) -> list[Row]:
    """Return the deployments of a group at which every method has an accuracy for each of its seeds.

    Methods that have no accuracy in the group at all are ignored.
    """
    available = []
    for method in methods:
        trained = set(evidence.seeds(task, method, REFERENCE))
        found = {
            deployment: set(evidence.accuracy(task, method, deployment))
            for deployment in evidence.deployed[task][method]
            if all(map(GROUPS[group], evidence.seeds(task, method, deployment).values()))
        }
        if any(found.values()):
            available.append({deployment for deployment, seeds in found.items() if seeds == trained})
    if not available:
        return []
    common = set.intersection(*available)
    return [deployment for deployment in evidence.deployments(task, methods) if deployment in common]


def mean_over(evidence: Evidence, task: str, method: str, deployments: Sequence[Row], key: str) -> SeedValues:
    """Return the mean over deployments by seed, for the seeds that all of them have."""
    found = [evidence.metric(task, method, deployment, key) for deployment in deployments]
    seeds = set.intersection(*map(set, found)) if found else set()
    return {seed: fmean(values[seed] for values in found) for seed in sorted(seeds)}


def worst_over(evidence: Evidence, task: str, method: str, deployments: Sequence[Row]) -> SeedValues:
    """Return the accuracy at the deployment that is worst for each seed."""
    found = [evidence.accuracy(task, method, deployment) for deployment in deployments]
    seeds = set.intersection(*map(set, found)) if found else set()
    return {seed: min(values[seed] for values in found) for seed in sorted(seeds)}


class Estimate(NamedTuple):
    """Hold a mean over `n` seeds. `half` is half the width of its interval, None for a single seed."""

    mean: float
    half: float | None
    n: int

    @property
    def positive(self) -> bool:
        """Tell whether the whole interval lies above 0."""
        return self.half is not None and self.mean > self.half


def interval(values: Iterable[float], level: float = LEVEL) -> Estimate | None:
    """Estimate the mean of independent values with its t-interval: mean ± t_{n-1, (1 + level) / 2} s / √n.

    The estimate is None if there are no values.

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
    """Estimate the mean difference over the seeds that both have, with its interval.

    >>> paired({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 6.0})
    Estimate(mean=1.0, half=0.0, n=2)
    """
    return interval((ahead[seed] - behind[seed] for seed in ahead if seed in behind), level)


def written(estimate: Estimate | None, scale: float = 1.0, digits: int = 2, signed: bool = False) -> str:
    """Write an estimate as `mean ± half`, as only the mean for a single seed, or as a dash.

    >>> written(Estimate(0.8512, 0.0034, 3), 100), written(Estimate(-0.01, None, 1), 100, signed=True)
    ('85.12 ± 0.34', '−1.00')
    """
    if estimate is None:
        return "–"
    mean = round(scale * estimate.mean, digits) + 0.0  # no negative zero
    text = f"{mean:{'+' if signed and mean else ''}.{digits}f}".replace("-", "−")
    return text if estimate.half is None else f"{text} ± {scale * estimate.half:.{digits}f}"
