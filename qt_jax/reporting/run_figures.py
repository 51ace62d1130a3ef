"""Draw the pictures of a run's report, as small panels that a page can lay out by its width."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from qt_jax.export.encodings import Encoding
from qt_jax.reporting.deployment_figures import draw_diagram
from qt_jax.reporting.figures import COLOURS, INK, MARKERS, canvas, method_colour, over_rms
from qt_jax.reporting.pivot import title
from qt_jax.reporting.statistics import Reliability

CURVE = (4.2, 2.5)
"""Inches of a panel with curves."""
LAYER = (2.15, 1.4)
"""Inches of a panel for one layer."""
LINE = 0.21
"""Inches of height that one layer takes where each has a line of its own."""


class Series(NamedTuple):
    """Describe one line of a panel: values `(points,)` at epochs `(points,)`."""

    label: str
    epochs: Sequence[float]
    values: Sequence[float]
    colour: str = INK
    style: str = "-"


def draw_curves(series: Sequence[Series], name: str) -> Figure:
    """Draw lines over epochs, with a legend if there are several; `name` labels the vertical axis.

    >>> figure = draw_curves([Series("loss", (1, 2), (0.5, 0.25))], "loss")
    >>> figure.axes[0].get_ylabel()
    'loss'
    """
    figure = canvas(*CURVE)
    axes = figure.add_subplot()
    for line in series:
        mark = "o" if len(line.epochs) == 1 else None
        axes.plot(
            line.epochs, line.values, line.style, marker=mark, color=line.colour, label=line.label, lw=1.6
        )
    axes.set_ylabel(name)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    _plain(axes)
    return figure


def draw_threshold(epochs: Sequence[float], values: Sequence[float], limits: tuple[float, float]) -> Figure:
    """Draw one layer's tau over training, and print its first and last value.

    Args:
      epochs, values: Epochs and tau at each, of the same length.
      limits: Ends of the vertical axis, the same in the panels of all layers.
    """
    figure, axes = _layer_panel()
    axes.plot(epochs, values, color=COLOURS["quant-trim"], lw=1.6, marker="o" if len(epochs) == 1 else None)
    axes.set_ylim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.text(
        *(0.98, 0.97, f"{values[0]:.3g} → {values[-1]:.3g}"),
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=8,
    )
    return figure


def draw_histogram(weights: Mapping[str, np.ndarray]) -> Figure:
    """Draw one layer's weights over their root mean square, with one line per method.

    The counts are on a logarithmic axis.

    Args:
      weights: Values `(size,)` by method.
    """
    figure, axes = _layer_panel()
    scaled = {method: over_rms(values) for method, values in weights.items()}
    limit = max(float(np.abs(values).max(initial=1.0)) for values in scaled.values())
    bins = np.linspace(-limit, limit, 62)
    for index, (method, values) in enumerate(scaled.items()):
        colour = method_colour(method, index)
        axes.hist(values, bins.tolist(), histtype="step", log=True, color=colour, lw=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(bottom=0.7)
    return figure


def draw_tails(weights: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw the largest weight over the root mean square, with one line per layer and one mark per method.

    Args:
      weights: Values `(size,)` by method and layer.
    """
    layers = list(dict.fromkeys(layer for values in weights.values() for layer in values))
    figure = canvas(4.6, LINE * len(layers) + 1.0)
    axes = figure.add_subplot()
    for index, (method, values) in enumerate(weights.items()):
        places = [layers.index(layer) for layer in values]
        tails = [tail(value) for value in values.values()]
        colour, mark = method_colour(method, index), MARKERS.get(method, "^")
        axes.plot(tails, places, mark, color=colour, ms=6, label=title(method))
    both = [layer for layer in layers if all(layer in values for values in weights.values())]
    spans = [[tail(values[layer]) for values in weights.values()] for layer in both]
    places = [layers.index(layer) for layer in both]
    axes.hlines(places, [min(s) for s in spans], [max(s) for s in spans], color="0.75", lw=1.5, zorder=1)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("largest |w| / root mean square")
    figure.legend(loc="outside upper left", ncols=len(weights), frameon=False, fontsize=8.5)
    _plain(axes, "x")
    axes.tick_params(axis="y", length=0, labelsize=8)
    return figure


def draw_ranges(tensors: Mapping[str, Encoding]) -> Figure:
    """Draw one bar per tensor from the least to the largest number of its grid; learned ones stand out."""
    shades = {"learned": COLOURS["quant-trim"], "calibrated": "0.75"}
    figure = canvas(4.6, LINE * len(tensors) + 1.0)
    axes = figure.add_subplot()
    for place, encoding in enumerate(tensors.values()):
        low, high = min(encoding.low), max(encoding.high)
        axes.barh(place, high - low, 0.62, low, color=shades.get(encoding.source, INK))
    axes.use_sticky_edges = False
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(tensors)), list(tensors))
    axes.set_ylim(len(tensors) - 0.4, -0.6)
    axes.set_xlabel("value")
    sources = dict.fromkeys(encoding.source for encoding in tensors.values())
    handles = [Patch(color=shades.get(source, INK), label=source) for source in sources]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5)
    _plain(axes, "x")
    axes.tick_params(axis="y", length=0, labelsize=8)
    return figure


def draw_reliability(item: Reliability, colour: str) -> Figure:
    """Draw one reliability diagram."""
    figure = canvas(2.55, 2.55)
    axes = figure.add_subplot()
    draw_diagram(axes, item, colour)
    axes.set_xlabel("confidence", fontsize=8.5)
    axes.set_ylabel("accuracy", fontsize=8.5)
    return figure


def tail(values: np.ndarray) -> float:
    """Return the largest magnitude over the root mean square.

    >>> tail(np.float32([1, 1, 1, 1]))
    1.0
    """
    return float(np.abs(over_rms(values)).max())


def _layer_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=LAYER)
    axes = figure.add_axes((0.17, 0.15, 0.8, 0.8))
    _plain(axes)
    axes.tick_params(labelsize=8)
    return figure, axes


def _plain(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
