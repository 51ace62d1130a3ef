"""Two heat maps of deployments: accuracy drop by row and network, and agreement of every two rows.

Both colour a percentage by the same fixed steps, each about twice the last, so that 0.1 and 0.5 are as easy
to tell apart as 10 and 50, and two reports can be laid side by side.
"""

import math
import os
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from qt_jax.reporting.agreement import agreement_matrix
from qt_jax.reporting.cells import spread
from qt_jax.reporting.deployment import Column, Deployment, Row, drops, images, statuses
from qt_jax.reporting.figures import INK

STEPS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
COLOUR_MAP = matplotlib.colormaps["viridis_r"]
NORM = BoundaryNorm(STEPS, COLOUR_MAP.N, extend="both")
INCHES_A_CHARACTER = 0.075
DPI = 110
MOST_PRINTED = 48
"""Rows of an agreement matrix beyond which its cells are small and hold no numbers."""


def canvas(width: float, height: float) -> Figure:
    """An empty figure of so many inches, with constrained layout and margins."""
    figure = Figure((width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes the PNG whole or not at all."""
    scratch = path.with_name(f"{path.name}.partial")
    figure.savefig(scratch, format="png")
    os.replace(scratch, path)
    return path


def drop_figure(deployment: Deployment, path: Path) -> Path:
    """Writes `draw_drops` as a PNG."""
    return save(draw_drops(deployment), path)


def draw_drops(deployment: Deployment) -> Figure:
    """A cell a row and network, coloured by its drop in points, hatched with its status where it has none."""
    rows, columns = deployment.rows, deployment.columns
    labels = _labels(deployment)
    side = INCHES_A_CHARACTER * max(map(len, labels))
    figure = canvas(max(7.0, side + 1.25 * len(columns) + 1.6), max(3.4, 2.0 + 0.27 * len(rows)))
    axes = figure.add_subplot()
    values = np.full((len(rows), len(columns)), np.nan)
    for j, column in enumerate(columns):
        for i, row in enumerate(rows):
            seeds = deployment.seeds(column, row)
            if lost := drops(seeds):
                values[i, j] = 100 * spread(lost)[0]
                _print(axes, j, i, _plain(values[i, j]), values[i, j], 8.5)
            else:
                _hatch(axes, j, i)
                text = axes.text(
                    j, i, ", ".join(statuses(seeds)) or "–", ha="center", va="center", fontsize=8
                )
                text.set_bbox({"facecolor": "0.95", "edgecolor": "none", "pad": 1})
    axes.imshow(values, cmap=COLOUR_MAP, norm=NORM, aspect="auto", interpolation="nearest")
    names = [textwrap.fill(deployment.name(column), 15) for column in columns]
    axes.set_xticks(range(len(columns)), names)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(rows)), labels)
    _grid(axes, rows, len(columns))
    _colour_bar(figure, axes, [f"{step:g}" for step in STEPS], "points of top-1")
    figure.suptitle(
        "Accuracy drop against the float model on the same images", x=0.02, ha="left", fontsize=11
    )
    return figure


def agreement_figure(deployment: Deployment, column: Column, path: Path) -> Path | None:
    """A cell a pair of rows with the percentage of images they decide alike; None if fewer than two rows."""
    rows, matrix = agreement_matrix(deployment, column)
    if len(rows) < 2:
        return None
    labels = [str(row) for row in rows]
    printed = len(rows) <= MOST_PRINTED
    side = INCHES_A_CHARACTER * max(map(len, labels)) * (1.0 if printed else 0.8)
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
            _print(axes, j, i, text, differ[i, j], 7)
    axes.imshow(differ, cmap=COLOUR_MAP, norm=NORM, aspect="equal", interpolation="nearest")
    axes.set_xticks(range(len(rows)), labels, rotation=90)
    axes.set_yticks(range(len(rows)), labels)
    _grid(axes, rows, len(rows), square=True)
    if not printed:
        axes.tick_params(labelsize=6.5)
        axes.grid(which="minor", linewidth=0.2)
    _colour_bar(figure, axes, [f"{100 - step:g}" for step in STEPS], "% of images decided alike")
    figure.suptitle(f"Same decision: {deployment.name(column)}", x=0.02, ha="left", fontsize=11)
    return save(figure, path)


def _labels(deployment: Deployment) -> list[str]:
    """The rows' names, with the number of images where it is not the largest one."""
    sizes = {
        row: {n for column in deployment.columns for n in images(deployment.seeds(column, row))}
        for row in deployment.rows
    }
    largest = max((n for found in sizes.values() for n in found), default=None)
    return [
        f"{row}, n {min(found)}" if (found := sizes[row] - {largest}) else str(row) for row in deployment.rows
    ]


def _plain(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _print(axes: Axes, x: float, y: float, text: str, value: float, size: float) -> None:
    """`text` in black or white, whichever stands out from the colour of `value`."""
    luminance = np.dot(COLOUR_MAP(NORM(value))[:3], (0.2126, 0.7152, 0.0722))
    axes.text(
        x, y, text, ha="center", va="center", fontsize=size, color="black" if luminance > 0.45 else "white"
    )


def _hatch(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="0.93", edgecolor="0.8", hatch="///", linewidth=0)
    )


def _grid(axes: Axes, rows: list[Row], columns: int, square: bool = False) -> None:
    """Thin white lines between cells, dark ones between backends."""
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


def _colour_bar(figure: Figure, axes: Axes, ticks: list[str], label: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(NORM, COLOUR_MAP), ax=axes, shrink=min(1.0, 6 / figure.get_figheight()), anchor=(0, 1)
    )
    bar.set_ticks(STEPS, labels=ticks)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)
