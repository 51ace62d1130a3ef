"""Make the study's figures: what each shows, as plain data from records, and how it is drawn.

Each kind of figure has a function that takes its data from the records, and a function `draw_*` that makes a
PNG of them: the same bytes for the same data. A figure whose data and drawing code have not changed is right
without being drawn again.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from experiments.configs.methods import FLOAT, METHODS
from experiments.paper.evidence import PUBLISHED, RECOMMENDED, Evidence, reference_score, score
from experiments.paper.structure import BINS
from experiments.paper.tables import layer_sqnr
from qt_jax.diagnosis.toolchains import LAYER_SCHEMES
from qt_jax.reporting.figures import COLOURS, INK, OTHER_COLOURS, canvas, save_figure
from qt_jax.reporting.pivot import REFERENCE, precision
from qt_jax.reporting.statistics import expected_calibration_error, pooled

COMPARED = (FLOAT, PUBLISHED, RECOMMENDED)
"""Methods whose networks are looked into."""

RENEWED = ("folded", "clips", "batch-norm")
"""Methods that change one thing in the published recipe, for the SQNR of layers."""

KNOWN_COLOURS = {
    "float + PTQ": COLOURS["float"],
    "Quant-Trim (published)": COLOURS["quant-trim"],
    "Quant-Trim, recommended": OTHER_COLOURS[0],
}
"""Colours of methods by their titles."""

FURTHER_COLOURS = (*OTHER_COLOURS[1:], "#8C564B", "#999999", "#7F3C8D", INK)
"""Colours of all other methods, by their position."""

SHAPES = "osD^vP*Xh<>p"
"""Markers of methods, by their position."""

TICKS = (0, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
"""Ticks of accuracy drops, in points."""

FigureData = dict[str, Any]
"""Data of a figure, as JSON can hold them."""


class StudyFigure(NamedTuple):
    """Hold the data of one figure, and the function that draws them into a PNG."""

    data: FigureData
    draw: Callable[[FigureData, Path], None]

    @property
    def data_digest(self) -> str:
        """Return the SHA-256 of the data."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    @property
    def program_digest(self) -> str:
        """Return the SHA-256 of the source that draws the figure, see `drawing_source`."""
        return hashlib.sha256(drawing_source(self.draw.__name__).encode()).hexdigest()


@functools.cache
def drawing_source(name: str) -> str:
    """Return the source of a function of this module, and of all functions and constants here that it uses.

    >>> "def draw_ranges" in drawing_source("draw_ranges"), "def _plain" in drawing_source("draw_ranges")
    (True, True)
    """
    text = Path(__file__).read_text(encoding="utf-8")
    definitions = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inner = (name for target in targets for name in ast.walk(target))
            definitions |= {name.id: node for name in inner if isinstance(name, ast.Name)}
    used, waiting = set(), {name}
    while waiting:
        used |= waiting
        nodes = (inner for found in waiting for inner in ast.walk(definitions[found]))
        waiting = {node.id for node in nodes if isinstance(node, ast.Name)} & definitions.keys() - used
    statements = dict.fromkeys(definitions[found] for found in sorted(used))
    return "\n".join(ast.get_source_segment(text, statement) for statement in statements)


def figures(evidence: Evidence) -> dict[str, StudyFigure]:
    """Return file name -> figure, for the figures that the records have data for."""
    kinds = {
        "drops": (drops, draw_drops),
        "reliability": (reliability, draw_reliability),
        "tails": (tails, draw_tails),
        "ranges": (ranges, draw_ranges),
        "layers": (layers, draw_layers),
        "curriculum": (curriculum, draw_curriculum),
    }
    found = {}
    for task in evidence.tasks:
        for kind, (data_of, draw) in kinds.items():
            data = data_of(evidence, task)
            if data is not None:
                found[f"{kind}-{task}.png"] = StudyFigure(data, draw)
    return found


def drops(evidence: Evidence, task: str) -> FigureData | None:
    """Return the points lost against the own float network on the same images, by deployment and method.

    There is a panel of INT8 and one of INT4 deployments. A mark is mean, minimum and maximum over seeds.
    """
    methods = evidence.methods(task)
    panels: dict[str, list[FigureData]] = {"INT8": [], "INT4": []}
    for deployment in evidence.deployments(task, methods):
        marks, kinds = {}, set()
        for method in methods:
            seeds = evidence.seeds(task, method, deployment)
            kinds.add(precision(seeds) if seeds else None)
            lost = [100 * (reference_score(r) - score(r)) for r in seeds.values() if score(r) is not None]
            if lost:
                marks[METHODS[method].title] = [round(x, 9) for x in (mean(lost), min(lost), max(lost))]
        for kind in kinds & panels.keys():
            if marks:
                panels[kind].append({"place": f"{deployment.backend} {deployment.scheme}", "marks": marks})
    panels = {kind: rows for kind, rows in panels.items() if rows}
    titles = [METHODS[method].title for method in methods]
    return {"task": task, "methods": titles, "panels": panels} if panels else None


def draw_drops(data: FigureData, path: Path) -> None:
    """Draw one panel for INT8 and one for INT4, with one line per deployment and one mark per method."""
    panels = data["panels"]
    heights = [len(rows) for rows in panels.values()]
    figure = canvas(9.5, 2.0 + 0.36 * sum(heights))
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for area, (kind, rows) in zip(axes, panels.items(), strict=True):
        for index, method in enumerate(data["methods"]):
            shift = 0.7 * ((index + 0.5) / len(data["methods"]) - 0.5)
            positions = [position for position, row in enumerate(rows) if method in row["marks"]]
            marks = [rows[position]["marks"][method] for position in positions]
            if not marks:
                continue
            area.errorbar(
                [mean for mean, _, _ in marks],
                [position + shift for position in positions],
                xerr=[[mean - low for mean, low, _ in marks], [high - mean for mean, _, high in marks]],
                fmt=SHAPES[index % len(SHAPES)],
                color=_colour(method, index),
                markersize=4.5,
                linewidth=0.9,
                label=method,
            )
        area.set_yticks(range(len(rows)), [row["place"] for row in rows])
        area.set_ylim(len(rows) - 0.5, -0.5)
        area.axvline(0, color=INK, linewidth=0.8)
        area.set_xscale("symlog", linthresh=1.0)
        area.xaxis.set_major_locator(
            FixedLocator(sorted({sign * tick for tick in TICKS for sign in (1, -1)}))
        )
        area.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        area.set_title(f"{kind}: points lost against the own FP32", loc="left", fontsize=10)
        for edge in np.arange(len(rows) - 1) + 0.5:
            area.axhline(edge, color="0.92", linewidth=0.8, zorder=0)
        _plain(area)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    _finish(figure, f"{data['task']}: accuracy drop by backend, mean and extremes over seeds", path)


def reliability(evidence: Evidence, task: str) -> FigureData | None:
    """Return bins of confidence for FP32, INT8 and INT4 deployments, over the images of all seeds."""
    lines = {}
    for method in [name for name in COMPARED if name in evidence.methods(task)]:
        by_kind: dict[str, dict[Any, Any]] = {kind: {} for kind in ("FP32", "INT8", "INT4")}
        for deployment in evidence.deployments(task, [method]):
            seeds = evidence.seeds(task, method, deployment)
            kind = "FP32" if deployment == REFERENCE else precision(seeds)
            if kind in by_kind:
                by_kind[kind] |= {(deployment, seed): record for seed, record in seeds.items()}
        bins = {kind: pooled(mine) for kind, mine in by_kind.items()}
        bins = {kind: found.round(9).tolist() for kind, found in bins.items() if found is not None}
        if bins:
            lines[METHODS[method].title] = bins
    return {"task": task, "lines": lines} if lines else None


def draw_reliability(data: FigureData, path: Path) -> None:
    """Draw one row of diagrams per method: accuracy by confidence for FP32, INT8 and INT4."""
    lines = data["lines"]
    kinds = list(dict.fromkeys(kind for bins in lines.values() for kind in bins))
    figure = canvas(2.9 * len(kinds) + 0.4, 2.7 * len(lines) + 0.6)
    grid = figure.subplots(len(lines), len(kinds), squeeze=False)
    for row, (index, (method, found)) in zip(grid, enumerate(lines.items()), strict=True):
        for area, kind in zip(row, kinds, strict=True):
            if kind not in found:
                area.set_visible(False)
                continue
            bins = np.asarray(found[kind])
            counts, _, accuracy = bins.T
            edges = np.linspace(0, 1, len(bins) + 1)
            area.bar(edges[:-1], counts / max(counts.sum(), 1), edges[1], align="edge", color="0.78")
            full = counts > 0
            area.hlines(
                accuracy[full], edges[:-1][full], edges[1:][full], color=_colour(method, index), linewidth=2.5
            )
            area.plot((0, 1), (0, 1), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            area.set_xlim(0, 1)
            area.set_ylim(0, 1.02)
            ece = 100 * expected_calibration_error(bins)
            area.set_title(f"{method}, {kind}: ECE {ece:.1f} %", loc="left", fontsize=8)
            _plain(area)
        row[0].set_ylabel("accuracy", fontsize=9)
    for area in grid[-1]:
        area.set_xlabel("confidence", fontsize=9)
    _finish(figure, f"{data['task']}: reliability, all deployments and seeds together", path)


def tails(evidence: Evidence, task: str) -> FigureData | None:
    """Return histograms of weights over their layer's root mean square, over all seeds.

    By layer there are the largest weight and the scale of the median channel, as means over seeds.
    """
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


def draw_tails(data: FigureData, path: Path) -> None:
    """Draw histograms of raw and folded weights, the largest weight, and the median channel's scale."""
    methods = data["methods"]
    figure = canvas(11, 8)
    axes = figure.subplots(2, 2)
    most = max(max(np.flatnonzero(h)) for found in methods.values() for h in found["histograms"].values())
    for index, (method, found) in enumerate(methods.items()):
        colour = _colour(method, index)
        for area, kind in zip(axes[0], ("raw", "folded"), strict=True):
            counts = np.asarray(found["histograms"][kind], np.float64)
            edges = [*BINS, BINS[-1] + (BINS[1] - BINS[0])]
            area.stairs(counts, edges, color=colour, linewidth=1.4, label=method)
        positions = np.arange(len(found["layers"]))
        for area, key in zip(axes[1], ("largest", "median_channel"), strict=True):
            area.plot(positions, found[key], SHAPES[index], color=colour, markersize=5, label=method)
    for area, kind in zip(axes[0], ("raw", "folded"), strict=True):
        area.set_yscale("log")
        area.set_xlim(0, BINS[most] + 0.5)
        area.set_xlabel("|w| / root mean square of its layer")
        area.set_ylabel("number of weights")
        area.set_title(f"{kind} kernels", loc="left", fontsize=10)
    names = next(iter(methods.values()))["layers"]
    for area, title in zip(
        axes[1],
        ("largest |w| / root mean square, folded", "scale of the median channel / of the tensor, folded"),
        strict=True,
    ):
        _name_layers(area, names)
        area.set_ylim(bottom=0)
        area.set_title(title, loc="left", fontsize=10)
    for area in axes.flat:
        _plain(area)
    axes[0, 0].legend(frameon=False, fontsize=8)
    _finish(figure, f"{data['task']}: weight tails and scales, before and after", path)


def ranges(evidence: Evidence, task: str) -> FigureData | None:
    """Return each layer's input over calibration images, and the range learned for it, of the first seed."""
    found = {}
    for method, records in _structures(evidence, task):
        first = records[0]
        found[METHODS[method].title] = {
            "layers": _layers(first),
            "observed": [layer["input"] for layer in first["layers"]],
            "learned": [layer["learned"] for layer in first["layers"]],
        }
    return {"task": task, "methods": found} if found else None


def draw_ranges(data: FigureData, path: Path) -> None:
    """Draw one panel per method: span, 0.1 to 99.9 % quantiles and learned range of each layer's input."""
    methods = data["methods"]
    figure = canvas(max(8.0, 0.4 * len(next(iter(methods.values()))["layers"]) + 2), 2.5 * len(methods) + 1.4)
    axes = figure.subplots(len(methods), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for index, (area, (method, found)) in enumerate(zip(axes, methods.items(), strict=True)):
        colour = _colour(method, index)
        observed = np.asarray(found["observed"])
        positions = np.arange(len(observed))
        area.vlines(
            positions, observed[:, 0], observed[:, 3], color="0.75", linewidth=3, label="least to largest"
        )
        area.vlines(
            positions, observed[:, 1], observed[:, 2], color=colour, linewidth=6, label="0.1 % to 99.9 %"
        )
        for position, learned in enumerate(found["learned"]):
            if learned is not None:
                label = "learned range" if position == 0 else None
                area.hlines(learned, position - 0.35, position + 0.35, color=INK, linewidth=1.2, label=label)
        area.set_title(method, loc="left", fontsize=10)
        area.set_ylabel("input")
        area.legend(frameon=False, fontsize=7, loc="upper right", ncols=3)
        _plain(area)
    _name_layers(axes[-1], next(iter(methods.values()))["layers"])
    _finish(figure, f"{data['task']}: activation ranges by layer", path)


def layers(evidence: Evidence, task: str) -> FigureData | None:
    """Return the SQNR of every layer's output in onnxruntime's schemes by method, as means over seeds."""
    panels = {}
    for scheme in LAYER_SCHEMES:
        lines = {}
        for method, mine in layer_sqnr(evidence, task, scheme).items():
            if method in COMPARED + RENEWED and mine:
                lines[METHODS[method].title] = {name: round(mean(found), 9) for name, found in mine.items()}
        if lines:
            panels[scheme] = lines
    return {"task": task, "panels": panels} if panels else None


def draw_layers(data: FigureData, path: Path) -> None:
    """Draw one panel per scheme, with one mark per method and layer: the SQNR of the layer's output."""
    panels = data["panels"]
    names = list(dict.fromkeys(n for lines in panels.values() for mine in lines.values() for n in mine))
    figure = canvas(max(8.0, 0.4 * len(names) + 2), 2.4 * len(panels) + 1.6)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for area, (scheme, lines) in zip(axes, panels.items(), strict=True):
        for index, (method, mine) in enumerate(lines.items()):
            positions = [names.index(name) for name in mine]
            colour = _colour(method, index)
            area.plot(positions, list(mine.values()), SHAPES[index], color=colour, markersize=5, label=method)
        area.set_title(scheme, loc="left", fontsize=10)
        area.set_ylabel("dB")
        area.grid(axis="x", color="0.92")
        _plain(area)
    _name_layers(axes[-1], names)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    _finish(figure, f"{data['task']}: SQNR of every layer's output, onnxruntime, mean over seeds", path)


def curriculum(evidence: Evidence, task: str) -> FigureData | None:
    """Return lambda of every method whose schedule no method before it has, and tau by layer.

    Both are those of the first seed.
    """
    lambdas: dict[str, FigureData] = {}
    tau: dict[str, FigureData] = {}
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


def draw_curriculum(data: FigureData, path: Path) -> None:
    """Draw lambda over training with one line per schedule, and tau of reverse pruning with one per layer."""
    tau = data["tau"]
    figure = canvas(10, 3.4 + 2.8 * len(tau))
    axes = figure.subplots(1 + len(tau), 1, squeeze=False)[:, 0]
    for index, (method, found) in enumerate(data["lambda"].items()):
        style = ("-", "--", ":", "-.")[index // len(FURTHER_COLOURS) % 4]
        colour = _colour(method, index)
        axes[0].plot(found["epoch"], found["lambda"], style, color=colour, label=method)
    axes[0].set_ylabel("λ")
    axes[0].set_xlabel("epoch")
    axes[0].legend(frameon=False, fontsize=8)
    for area, (method, found) in zip(axes[1:], tau.items(), strict=True):
        for index, (layer, values) in enumerate(found["layers"].items()):
            shade = str(0.15 + 0.65 * index / max(1, len(found["layers"]) - 1))
            known = [(e, v) for e, v in zip(found["epoch"], values, strict=True) if v is not None]
            area.plot(*zip(*known, strict=True), "o-", color=shade, markersize=3, linewidth=1)
            area.annotate(layer, known[-1], (4, 0), textcoords="offset points", fontsize=6, va="center")
        area.set_yscale("log")
        area.set_ylabel("τ")
        area.set_xlabel("epoch")
        area.set_title(method, loc="left", fontsize=10)
    for area in axes:
        _plain(area)
    _finish(figure, f"{data['task']}: λ and τ over training", path)


def _structures(evidence: Evidence, task: str) -> list[tuple[str, list]]:
    """Return the structure records of the compared methods, by seed."""
    mine = {method: [] for method in COMPARED}
    for record in evidence.structure:
        if record["task"] == task and record["method"] in mine:
            mine[record["method"]].append(record)
    return [(method, records) for method, records in mine.items() if records]


def _layers(record: FigureData) -> list[str]:
    """Return the names of the layers."""
    return [layer["layer"] for layer in record["layers"]]


def _over_seeds(records: Sequence[FigureData], of: Callable[[FigureData], float]) -> list[float]:
    """Return the mean over seeds of a number of each layer."""
    values = [[of(layer) for layer in record["layers"]] for record in records]
    return [mean(column) for column in zip(*values, strict=True)]


def _colour(method: str, index: int) -> str:
    """Return the colour of a method, given its title and its position."""
    return KNOWN_COLOURS.get(method, FURTHER_COLOURS[index % len(FURTHER_COLOURS)])


def _name_layers(axes: Axes, names: list[str]) -> None:
    """Label the horizontal axis with the names of layers."""
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)


def _plain(axes: Axes) -> None:
    """Remove the upper and the right spine."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _finish(figure: Figure, title: str, path: Path) -> None:
    """Set the title and write the PNG."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    save_figure(figure, path)
