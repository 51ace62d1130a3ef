"""The study's figures: what each shows, as plain data from records, and how it is drawn.

Data first: a figure whose data have not changed need not be drawn again to know that it is right.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiments.configs.methods import METHODS
from experiments.layer_comparison import SCHEMES
from experiments.paper import drawing
from experiments.paper.evidence import FLOAT, PUBLISHED, RECOMMENDED, Evidence, reference_score, score
from experiments.paper.layer_tables import layer_sqnr
from qt_jax.reporting.deployment import REFERENCE, precision
from qt_jax.reporting.reliability import pooled

COMPARED = (FLOAT, PUBLISHED, RECOMMENDED)
"""The methods whose networks are looked into."""
RENEWED = ("folded", "clips", "batch-norm")
"""What is done to the published recipe alone, one thing at a time, for the SQNR of layers."""

Data = dict[str, Any]


class Drawable(NamedTuple):
    """The data of one figure, and what draws them into a PNG."""

    data: Data
    draw: Callable[[Data, Path], None]

    @property
    def digest(self) -> str:
        """SHA-256 of the data."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()


def figures(evidence: Evidence) -> dict[str, Drawable]:
    """File name -> figure, those only that the records have something for."""
    kinds = {
        "drops": (drops, drawing.drops),
        "reliability": (reliability, drawing.reliability),
        "tails": (tails, drawing.tails),
        "ranges": (ranges, drawing.ranges),
        "layers": (layers, drawing.layers),
        "curriculum": (curriculum, drawing.curriculum),
    }
    found = {}
    for task in evidence.tasks:
        for kind, (data_of, draw) in kinds.items():
            data = data_of(evidence, task)
            if data is not None:
                found[f"{kind}-{task}.png"] = Drawable(data, draw)
    return found


def drops(evidence: Evidence, task: str) -> Data | None:
    """Points lost against the own float network on the same images, by INT8 and INT4 place and method."""
    methods = evidence.methods(task)
    panels: dict[str, list[Data]] = {"INT8": [], "INT4": []}
    for place in evidence.places(task, methods):
        marks, kinds = {}, set()
        for method in methods:
            cell = evidence.seeds(task, method, place)
            kinds.add(precision(cell) if cell else None)
            lost = [100 * (reference_score(r) - score(r)) for r in cell.values() if score(r) is not None]
            if lost:
                marks[METHODS[method].title] = [round(x, 9) for x in (mean(lost), min(lost), max(lost))]
        for kind in kinds & panels.keys():
            if marks:
                panels[kind].append({"place": f"{place.backend} {place.scheme}", "marks": marks})
    panels = {kind: rows for kind, rows in panels.items() if rows}
    titles = [METHODS[method].title for method in methods]
    return {"task": task, "methods": titles, "panels": panels} if panels else None


def reliability(evidence: Evidence, task: str) -> Data | None:
    """Bins of confidence for FP32 and for the INT8 and INT4 deployments, images of all seeds together."""
    lines = {}
    for method in [name for name in COMPARED if name in evidence.methods(task)]:
        cells: dict[str, dict[Any, Any]] = {kind: {} for kind in ("FP32", "INT8", "INT4")}
        for place in evidence.places(task, [method]):
            cell = evidence.seeds(task, method, place)
            kind = "FP32" if place == REFERENCE else precision(cell)
            if kind in cells:
                cells[kind] |= {(place, seed): record for seed, record in cell.items()}
        bins = {kind: pooled(mine) for kind, mine in cells.items()}
        bins = {kind: found.round(9).tolist() for kind, found in bins.items() if found is not None}
        if bins:
            lines[METHODS[method].title] = bins
    return {"task": task, "lines": lines} if lines else None


def tails(evidence: Evidence, task: str) -> Data | None:
    """Weights over their layer's root mean square, all seeds together; largest, channel scales by layer."""
    found = {}
    for method, records in _structures(evidence, task):
        histograms = {
            kind: [sum(counts) for counts in zip(*(r["histograms"][kind] for r in records), strict=True)]
            for kind in ("raw", "folded")
        }
        found[METHODS[method].title] = {
            "histograms": histograms,
            "layers": _layers(records[0]),
            "largest": _over_seeds(records, lambda layer: layer["folded"]["tails"][-1]),
            "median_channel": _over_seeds(records, lambda layer: layer["folded"]["channels"][0]),
        }
    return {"task": task, "methods": found} if found else None


def ranges(evidence: Evidence, task: str) -> Data | None:
    """The inputs of every layer over calibration images, and the ranges learned for them; the first seed."""
    found = {}
    for method, records in _structures(evidence, task):
        first = records[0]
        found[METHODS[method].title] = {
            "layers": _layers(first),
            "observed": [layer["input"] for layer in first["layers"]],
            "learned": [layer["learned"] for layer in first["layers"]],
        }
    return {"task": task, "methods": found} if found else None


def layers(evidence: Evidence, task: str) -> Data | None:
    """SQNR of every layer's output in onnxruntime's schemes, means over seeds, by method."""
    panels = {}
    for scheme in SCHEMES:
        lines = {}
        for method, mine in layer_sqnr(evidence, task, scheme).items():
            if method in COMPARED + RENEWED and mine:
                lines[METHODS[method].title] = {name: round(mean(found), 9) for name, found in mine.items()}
        if lines:
            panels[scheme] = lines
    return {"task": task, "panels": panels} if panels else None


def curriculum(evidence: Evidence, task: str) -> Data | None:
    """Lambda of every method whose schedule no other method before it has; tau by layer, the first seed's."""
    lambdas: dict[str, Data] = {}
    tau: dict[str, Data] = {}
    seen = []
    for record in evidence.structure:
        if record["task"] != task or any(record["method"] == method for method, _ in seen):
            continue
        shape = record["lambda"]
        if all(shape != other for _, other in seen):
            lambdas[METHODS[record["method"]].title] = shape
        seen.append((record["method"], shape))
        if record["method"] in COMPARED and record["tau"]:
            layers = list(record["tau"][-1]["tau"])
            tau[METHODS[record["method"]].title] = {
                "epoch": [epoch["epoch"] for epoch in record["tau"]],
                "layers": {layer: [epoch["tau"].get(layer) for epoch in record["tau"]] for layer in layers},
            }
    return {"task": task, "lambda": lambdas, "tau": tau} if lambdas else None


def _structures(evidence: Evidence, task: str) -> list[tuple[str, list]]:
    """The structure records of the compared methods, by seed."""
    mine = {method: [] for method in COMPARED}
    for record in evidence.structure:
        if record["task"] == task and record["method"] in mine:
            mine[record["method"]].append(record)
    return [(method, records) for method, records in mine.items() if records]


def _layers(record: Data) -> list[str]:
    return [layer["layer"] for layer in record["layers"]]


def _over_seeds(records: Sequence[Data], of: Callable[[Data], float]) -> list[float]:
    """The mean over seeds of a number of each layer."""
    values = [[of(layer) for layer in record["layers"]] for record in records]
    return [sum(column) / len(column) for column in zip(*values, strict=True)]
