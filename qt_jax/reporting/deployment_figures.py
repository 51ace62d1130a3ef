"""Calibration and speed of deployments: reliability diagrams, and accuracy against latency."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qt_jax.reporting.cells import measured, spread
from qt_jax.reporting.deployment import Column, Deployment, Row, precision
from qt_jax.reporting.figures import COLOURS, INK, OTHER_COLOURS, method_colour
from qt_jax.reporting.heatmaps import canvas, save
from qt_jax.reporting.reliability import Reliability, representative

BACKEND_COLOURS = (*COLOURS.values(), *OTHER_COLOURS, "#F0E442", INK)
SHOWN_POINTS = 15
"""How far below the best row of its worst network, in points of top-1, the latency figure reaches down."""
PRECISION_MARKERS = {"INT8": "o", "INT4": "^", None: "s"}


def reliability_figure(deployment: Deployment, path: Path) -> Path | None:
    """A line of small diagrams a network: accuracy by confidence, FP32 and rows from best to worst ECE."""
    lines = {column: representative(deployment, column) for column in deployment.columns}
    lines = {column: items for column, items in lines.items() if items}
    if not lines:
        return None
    across = max(map(len, lines.values()))
    figure = canvas(max(2.6 * across, 4.6), 2.9 * len(lines) + 0.7)
    grid = figure.add_gridspec(len(lines), across)
    for index, (column, items) in enumerate(lines.items()):
        for place, item in enumerate(items):
            axes = figure.add_subplot(grid[index, place])
            draw_diagram(axes, item, method_colour(column.method, index))
            if place == 0:
                axes.set_ylabel(f"{textwrap.fill(deployment.name(column), 24)}\naccuracy", fontsize=9)
            if index == len(lines) - 1:
                axes.set_xlabel("confidence", fontsize=9)
    figure.suptitle("Reliability by top softmax probability", x=0.02, ha="left", fontsize=11)
    return save(figure, path)


def draw_diagram(axes: Axes, item: Reliability, shade: str) -> None:
    """Accuracy of each bin over its span, and the share of images in it as grey bars from the ground."""
    edges = np.linspace(0, 1, len(item.bins) + 1)
    counts, _, accuracy = item.bins.T
    width = edges[1]
    axes.bar(edges[:-1], counts / max(counts.sum(), 1), width, align="edge", color="0.75")
    full = counts > 0
    axes.hlines(accuracy[full], edges[:-1][full], edges[1:][full], color=shade, linewidth=2.5)
    axes.plot((0, 1), (0, 1), color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    name = textwrap.fill(str(item.row), 30) if item.why != "FP32" else str(item.row)
    axes.set_title(f"{item.why}: ECE {100 * item.ece:.1f} %\n{name}", fontsize=8, loc="left")


def latency_figure(deployment: Deployment, path: Path) -> Path | None:
    """A panel a network: top-1 by median latency at batch 1 (log), and the front that no row beats."""
    panels = {column: latencies(deployment, column) for column in deployment.columns}
    panels = {column: points for column, points in panels.items() if points}
    if not panels:
        return None
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = canvas(max(4.6 * across, 6.2), 3.8 * down + 1.1)
    backends = dict.fromkeys(row.backend for points in panels.values() for row in points)
    shades = {name: BACKEND_COLOURS[i % len(BACKEND_COLOURS)] for i, name in enumerate(backends)}
    values = [[100 * top1 for _, top1 in points.values()] for points in panels.values()]
    low, high = max(min(map(min, values)), min(map(max, values)) - SHOWN_POINTS), max(map(max, values))
    pad = max(0.2, 0.07 * (high - low))
    shared = None
    for index, (column, points) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, index + 1, sharex=shared, sharey=shared)
        shared = shared or axes
        _scatter(axes, deployment, column, points, shades, (low - pad, high + pad))
        axes.set_title(deployment.name(column), loc="left", fontsize=10)
        if index % across == 0:
            axes.set_ylabel("top-1 (%)")
        if index >= len(panels) - across:
            axes.set_xlabel("median latency at batch 1 (ms)")
    handles = [Line2D([], [], marker="o", ls="", color=shades[name], label=name) for name in backends]
    for name, marker in PRECISION_MARKERS.items():
        label = name or "other bits"
        handles.append(Line2D([], [], marker=marker, ls="", color="white", mec=INK, label=label))
    handles.append(Line2D([], [], color=INK, lw=0.9, label="front"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=min(len(handles), 5), frameon=False, fontsize=8.5
    )
    return save(figure, path)


def latencies(deployment: Deployment, column: Column) -> dict[Row, tuple[float, float]]:
    """Median latency in ms and top-1 of each row of a network that has both, means over seeds."""
    found = {}
    for row in deployment.rows:
        seeds = deployment.seeds(column, row)
        pair = [list(measured(seeds, key).values()) for key in ("latency_ms_p50", "top1")]
        if all(pair):
            found[row] = (spread(pair[0])[0], spread(pair[1])[0])
    return found


def front(points: dict[Row, tuple[float, float]]) -> list[Row]:
    """The rows that no other beats in both latency and accuracy, fastest first.

    >>> a, b, c = (Row("b", scheme, "") for scheme in "abc")
    >>> [row.scheme for row in front({a: (1.0, 0.8), b: (2.0, 0.7), c: (3.0, 0.9)})]
    ['a', 'c']
    """
    kept: list[Row] = []
    for row in sorted(points, key=lambda row: (points[row][0], -points[row][1])):
        if not kept or points[row][1] > points[kept[-1]][1]:
            kept.append(row)
    return kept


def _scatter(
    axes: Axes,
    deployment: Deployment,
    column: Column,
    points: dict[Row, tuple[float, float]],
    shades: dict[str, str],
    span: tuple[float, float],
) -> None:
    for row, (latency, top1) in points.items():
        marker = PRECISION_MARKERS[precision(deployment.seeds(column, row))]
        axes.plot(latency, 100 * top1, marker, color=shades[row.backend], ms=7, mec="white", mew=0.6)
    edge = np.array([points[row] for row in front(points)])
    axes.step(edge[:, 0], 100 * edge[:, 1], where="post", color=INK, linewidth=0.9, zorder=1)
    axes.set_xscale("log")
    axes.margins(0.08)
    axes.set_ylim(*span)
    if below := sum(100 * top1 < span[0] for _, top1 in points.values()):
        axes.text(
            *(0.02, 0.02, f"{below} row{'s' * (below > 1)} lower still"),
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            transform=axes.transAxes,
            fontsize=8,
            color=INK,
        )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
