"""Draw deployments: heat maps of drops and agreement, reliability diagrams, and accuracy against latency.

Both heat maps colour a percentage by the same fixed steps, each about twice the last. So 0.1 and 0.5 are as
easy to tell apart as 10 and 50, and two reports can be laid side by side. Where a network is judged without
labels, or by a metric that is no fraction, SQNR stands in for accuracy, with steps of its own.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qt_jax.reporting.figures import COLOURS, INK, OTHER_COLOURS, canvas, method_colour, save_figure
from qt_jax.reporting.pivot import (
    REFERENCE,
    Column,
    DeploymentTable,
    Row,
    Seeds,
    drops,
    images,
    measured,
    partly_float,
    precision,
    scores,
    share,
    spread,
    statuses,
)
from qt_jax.reporting.statistics import Reliability, agreement_matrix, representative

STEPS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
"""Percentages at which the colour of a heat map changes."""

COLOUR_MAP = matplotlib.colormaps["viridis_r"]

NORM = BoundaryNorm(STEPS, COLOUR_MAP.N, extend="both")

SQNR_STEPS = (5, 10, 15, 20, 25, 30, 35, 40, 50)
"""Decibels at which the colour of the heat map of SQNR changes."""

SQNR_COLOUR_MAP = matplotlib.colormaps["viridis"]

SQNR_NORM = BoundaryNorm(SQNR_STEPS, SQNR_COLOUR_MAP.N, extend="both")

MOST_SHOWN_SQNR = 60.0
"""Decibels above which a row of the latency figure counts as equal to float."""

INCHES_PER_CHARACTER = 0.075
"""Width of a character of a row's label."""

MOST_PRINTED = 48
"""Number of rows of an agreement matrix beyond which its cells are small and hold no numbers."""

BACKEND_COLOURS = (*COLOURS.values(), *OTHER_COLOURS, "#F0E442", INK)
"""Colours of backends in the latency figure."""

PRECISION_MARKERS = {"INT8": "o", "INT4": "^", None: "s"}
"""Markers of precisions in the latency figure."""

SHOWN_POINTS = 15
"""Points that the latency figure shows below the best row of its worst network."""


def drop_figure(deployment: DeploymentTable, path: Path) -> Path | None:
    """Write `draw_drops` as a PNG, and return its path; None where drops are not points."""
    return save_figure(draw_drops(deployment), path) if deployment.in_points() else None


def sqnr_figure(deployment: DeploymentTable, path: Path) -> Path | None:
    """Write `draw_sqnr` as a PNG, and return its path; None where `drop_figure` says more."""
    return None if deployment.in_points() else save_figure(draw_sqnr(deployment), path)


def draw_drops(deployment: DeploymentTable) -> Figure:
    """Draw one cell per row and network, coloured by its drop in points.

    A cell without a drop is hatched and shows its status.
    """
    titles = {metric.title for metric in deployment.by_metric() if metric is not None}
    return _heat_map(
        deployment,
        lambda seeds: [100 * value for value in drops(seeds)],
        (COLOUR_MAP, NORM, 2),
        f"points of {titles.pop() if len(titles) == 1 else 'the metric'}",
        "Accuracy drop against the float model on the same images",
    )


def draw_sqnr(deployment: DeploymentTable) -> Figure:
    """Draw one cell per row and network, coloured by the SQNR of its outputs in dB.

    A cell without an SQNR is hatched and shows its status.
    """
    return _heat_map(
        deployment,
        lambda seeds: list(measured(seeds, "sqnr_db").values()),
        (SQNR_COLOUR_MAP, SQNR_NORM, 1),
        "SQNR (dB)",
        "Closeness of the outputs to the float model's",
    )


def _heat_map(
    deployment: DeploymentTable,
    read: Callable[[Seeds], list[float]],
    shown: tuple[Colormap, BoundaryNorm, int],
    unit: str,
    heading: str,
) -> Figure:
    """Draw one cell per row and network.

    Args:
      deployment: Table of the cells.
      read: Returns the values of a cell, whose mean is shown.
      shown: Colours, the values at which they change, and the decimals.
      unit: Label of the colour bar.
      heading: Title of the figure.
    """
    colours, norm, digits = shown
    rows, columns = deployment.rows, deployment.columns
    labels = _labels(deployment)
    side = INCHES_PER_CHARACTER * max(map(len, labels))
    figure = canvas(max(7.0, side + 1.25 * len(columns) + 1.6), max(3.4, 2.0 + 0.27 * len(rows)))
    axes = figure.add_subplot()
    values = np.full((len(rows), len(columns)), np.nan)
    for j, column in enumerate(columns):
        for i, row in enumerate(rows):
            seeds = deployment.seeds(column, row)
            if found := read(seeds):
                values[i, j] = spread(found)[0]
                _print(axes, (j, i), _plain(values[i, j], digits), colours(norm(values[i, j])), 8.5)
            else:
                _hatch(axes, j, i)
                why = ", ".join(statuses(seeds)) or ("reference" if seeds and row == REFERENCE else "–")
                text = axes.text(j, i, why, ha="center", va="center", fontsize=8)
                text.set_bbox({"facecolor": "0.95", "edgecolor": "none", "pad": 1})
    axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    names = [textwrap.fill(deployment.name(column), 15) for column in columns]
    axes.set_xticks(range(len(columns)), names)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), labels)
    _grid(axes, rows, len(columns))
    _colour_bar(figure, axes, (colours, norm), [f"{step:g}" for step in norm.boundaries], unit)
    figure.suptitle(heading, x=0.02, ha="left", fontsize=11)
    return figure


def agreement_figure(deployment: DeploymentTable, column: Column, path: Path) -> Path | None:
    """Draw one cell per pair of rows, with the percentage of images that they decide alike, as a PNG.

    Returns:
      The path; None if fewer than two rows keep their decisions.
    """
    rows, matrix = agreement_matrix(deployment, column)
    if len(rows) < 2:
        return None
    labels = [str(row) for row in rows]
    printed = len(rows) <= MOST_PRINTED
    side = INCHES_PER_CHARACTER * max(map(len, labels)) * (1.0 if printed else 0.8)
    cell = 0.34 if printed else 0.125
    size = max(cell * len(rows), 3.2) + side
    figure = canvas(size + 1.4, size + 0.8)
    axes = figure.add_subplot()
    differ = 100 * np.where(np.tri(len(rows), k=-1, dtype=bool), 1 - matrix, np.nan)
    for i, j in zip(*np.tril_indices(len(rows), -1), strict=True):
        if np.isnan(differ[i, j]):
            _hatch(axes, j, i)
        elif printed:
            # Rounded down, so that 100 stands for all images.
            text = f"{math.floor(1000 * matrix[i, j] + 1e-6) / 10:.1f}" if differ[i, j] else "100"
            _print(axes, (j, i), text, COLOUR_MAP(NORM(differ[i, j])), 7)
    axes.imshow(differ, cmap=COLOUR_MAP, norm=NORM, aspect="equal", interpolation="nearest")
    axes.set_xticks(range(len(rows)), labels, rotation=90)
    axes.set_yticks(range(len(rows)), labels)
    _grid(axes, rows, len(rows), square=True)
    if not printed:
        axes.tick_params(labelsize=6.5)
        axes.grid(which="minor", linewidth=0.2)
    ticks = [f"{100 - step:g}" for step in STEPS]
    _colour_bar(figure, axes, (COLOUR_MAP, NORM), ticks, "% of images decided alike")
    figure.suptitle(f"Same decision: {deployment.name(column)}", x=0.02, ha="left", fontsize=11)
    return save_figure(figure, path)


def _labels(deployment: DeploymentTable) -> list[str]:
    """Return the rows' names, with what is unlike the others.

    That is the number of images where it is not the largest one, and the share of quantized layers where a
    part of the network is float.
    """
    sizes = {
        row: {n for column in deployment.columns for n in images(deployment.seeds(column, row))}
        for row in deployment.rows
    }
    largest = max((n for found in sizes.values() for n in found), default=None)
    labels = []
    for row in deployment.rows:
        cells = [deployment.seeds(column, row) for column in deployment.columns]
        notes = [f"n {min(found)}"] if (found := sizes[row] - {largest}) else []
        notes += dict.fromkeys(f"{share(seeds)} layers" for seeds in cells if partly_float(seeds))
        labels.append(", ".join([str(row), *notes]))
    return labels


def _plain(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _print(axes: Axes, place: tuple[float, float], text: str, shade: Sequence[float], size: float) -> None:
    """Print `text` in black or white, whichever stands out from the colour `shade` behind it."""
    luminance = np.dot(shade[:3], (0.2126, 0.7152, 0.0722))
    axes.text(
        *place, text, ha="center", va="center", fontsize=size, color="black" if luminance > 0.45 else "white"
    )


def _hatch(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="0.93", edgecolor="0.8", hatch="///", linewidth=0)
    )


def _grid(axes: Axes, rows: list[Row], columns: int, square: bool = False) -> None:
    """Draw thin white lines between cells, and dark ones between backends."""
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    for place in range(1, len(rows)):
        if rows[place].backend != rows[place - 1].backend:
            axes.plot((-0.5, place - 0.5 if square else columns - 0.5), (place - 0.5,) * 2, color=INK, lw=1)
            if square:
                axes.plot((place - 0.5,) * 2, (place - 0.5, len(rows) - 0.5), color=INK, lw=1)


def _colour_bar(
    figure: Figure, axes: Axes, shown: tuple[Colormap, BoundaryNorm], ticks: list[str], label: str
) -> None:
    colours, norm = shown
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, shrink=min(1.0, 6 / figure.get_figheight()), anchor=(0, 1)
    )
    bar.set_ticks(norm.boundaries.tolist(), labels=ticks)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)


def reliability_figure(deployment: DeploymentTable, path: Path) -> Path | None:
    """Draw accuracy by confidence as a PNG, with one line of small diagrams per network.

    A line shows FP32, and the rows of best, median and worst ECE.

    Returns:
      The path; None if no record keeps its reliability.
    """
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
    return save_figure(figure, path)


def draw_diagram(axes: Axes, item: Reliability, shade: str) -> None:
    """Draw the accuracy of each bin over its span, and the share of images in it as grey bars."""
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
    name = textwrap.fill(str(item.row), 30) if item.reason != "FP32" else str(item.row)
    axes.set_title(f"{item.reason}: ECE {100 * item.ece:.1f} %\n{name}", fontsize=8, loc="left")


def latency_figure(deployment: DeploymentTable, path: Path) -> Path | None:
    """Draw the score by median latency at batch 1 (log) as a PNG, with one panel per network.

    A line shows the front that no row beats. Where drops are not points, SQNR stands in for the score.

    Returns:
      The path; None if no row was timed.
    """
    panels = {column: latencies(deployment, column) for column in deployment.columns}
    panels = {column: points for column, points in panels.items() if points}
    if not panels:
        return None
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = canvas(max(4.6 * across, 6.2), 3.8 * down + 1.1)
    backends = dict.fromkeys(row.backend for points in panels.values() for row in points)
    shades = {name: BACKEND_COLOURS[i % len(BACKEND_COLOURS)] for i, name in enumerate(backends)}
    values = [[value for _, value in points.values()] for points in panels.values()]
    low, high = min(map(min, values)), max(map(max, values))
    if deployment.in_points():
        low = max(low, min(map(max, values)) - SHOWN_POINTS)
    pad = max(0.2, 0.07 * (high - low))
    shared = None
    for index, (column, points) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, index + 1, sharex=shared, sharey=shared)
        shared = shared or axes
        _scatter(axes, deployment, column, points, shades, (low - pad, high + pad))
        axes.set_title(deployment.name(column), loc="left", fontsize=10)
        if index % across == 0:
            metric = deployment.metric(column) if deployment.in_points() else None
            axes.set_ylabel("SQNR (dB)" if metric is None else f"{metric.title} (%)")
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
    return save_figure(figure, path)


def latencies(deployment: DeploymentTable, column: Column) -> dict[Row, tuple[float, float]]:
    """Return the median latency in ms and the quality of each row that has both, as means over seeds.

    The quality is the score in %. Where drops are not points it is the SQNR, but at most `MOST_SHOWN_SQNR`.
    """
    points = deployment.in_points()
    found = {}
    for row in deployment.rows:
        seeds = deployment.seeds(column, row)
        times = measured(seeds, "latency_ms_p50").values()
        values = (scores(seeds) if points else measured(seeds, "sqnr_db")).values()
        if times and values:
            mean = spread(values)[0]
            found[row] = (spread(times)[0], 100 * mean if points else min(mean, MOST_SHOWN_SQNR))
    return found


def front(points: dict[Row, tuple[float, float]]) -> list[Row]:
    """Return the rows that no other row beats in both latency and accuracy, fastest first.

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
    deployment: DeploymentTable,
    column: Column,
    points: dict[Row, tuple[float, float]],
    shades: dict[str, str],
    span: tuple[float, float],
) -> None:
    for row, (latency, value) in points.items():
        marker = PRECISION_MARKERS[precision(deployment.seeds(column, row))]
        axes.plot(latency, value, marker, color=shades[row.backend], ms=7, mec="white", mew=0.6)
    edge = np.array([points[row] for row in front(points)])
    axes.step(edge[:, 0], edge[:, 1], where="post", color=INK, linewidth=0.9, zorder=1)
    axes.set_xscale("log")
    axes.margins(0.08)
    axes.set_ylim(*span)
    if below := sum(value < span[0] for _, value in points.values()):
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
