"""Draw the pictures of a diagnosis, with one line per layer in the order of the network."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from qt_jax.diagnosis.diagnosis import Diagnosis
from qt_jax.diagnosis.layers import layers_of
from qt_jax.export import graph
from qt_jax.files import write_whole
from qt_jax.reporting.figures import COLOURS, INK, OTHER_COLOURS, canvas, save_figure, to_svg
from qt_jax.reporting.run_figures import draw_histogram, tail

WIDTH = 4.6
"""Inches of width of a picture."""

LINE = 0.26
"""Inches of height of one layer."""

LEAST_LINES = 4
"""Number of lines for which a picture has room at least, so that its legend fits."""

NAME = 32
"""Number of characters of a layer's name that are shown, from its end."""

BEFORE, AFTER = COLOURS["float"], COLOURS["quant-trim"]


def write_pictures(found: Diagnosis, folder: Path) -> dict[str, str]:
    """Draw all pictures of a diagnosis and write them into `folder`.

    Each picture is written as PNG for Markdown and as SVG for the report of a run.

    Returns:
      The caption of each picture, by its path relative to the parent of `folder`.
    """
    layers = layers_of(found.before.model)
    before, after = (graph.constants(item.model) for item in (found.before, found.after))
    kernels = {
        name: {layer: values[its.kernel].ravel() for layer, its in layers.items()}
        for name, values in (("before", before), ("after", after))
    }
    noise = {"simulated": found.ratios, "after the advice": found.mended_ratios}
    pictures: dict[str, tuple[str, Callable[[], Figure]]] = {
        "sensitivity": ("What each layer costs", partial(draw_sensitivity, found)),
        "noise": ("Noise behind each layer", partial(draw_noise, noise, list(layers))),
        "tails": ("Largest weight over root mean square", partial(draw_kernel_tails, *kernels.values())),
        "ranges": ("Values that each layer reads, and its grid", partial(draw_input_ranges, found)),
    }
    for index, layer in enumerate(layers):
        if not np.array_equal(kernels["before"][layer], kernels["after"][layer]):
            weights = {name: values[layer] for name, values in kernels.items()}
            caption = f"Weights of {layer} over their root mean square, before and after"
            pictures[f"weights-{index}"] = (caption, partial(draw_histogram, weights))
    for name, (_, draw) in pictures.items():
        save_figure(draw(), folder / f"{name}.png")
        write_whole(folder / f"{name}.svg", to_svg(draw, f"diagnosis-{name}") or "")
    return {f"{folder.name}/{name}.png": caption for name, (caption, _) in pictures.items()}


def draw_sensitivity(found: Diagnosis) -> Figure:
    """Draw what each layer costs by itself, and what leaving it in float gives back.

    Where right images are counted these are points of top-1. Otherwise it is the SQNR of the outputs.
    """
    return _draw_points(found) if found.floating.counts else _draw_decibels(found)


def _draw_points(found: Diagnosis) -> Figure:
    figure, axes = _lines(list(found.sensitivities))
    pairs = found.sensitivities.values()
    alone = [100 * (found.floating.score - item.alone.score) for item in pairs]
    spared = [100 * (item.all_but.score - found.all_rounded.score) for item in pairs]
    places = np.arange(len(alone))
    axes.barh(places - 0.19, alone, 0.36, color=BEFORE, label="lost, this layer alone rounded")
    axes.barh(places + 0.19, spared, 0.36, color=AFTER, label="regained, all but this layer rounded")
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_xlabel("points of top-1")
    _legend(figure, 1)
    return figure


def _draw_decibels(found: Diagnosis) -> Figure:
    """Draw the SQNR with each layer alone rounded, and with all but it. Where nothing differs is no mark."""
    figure, axes = _lines(list(found.sensitivities))
    pairs = list(found.sensitivities.values())
    places = range(len(pairs))
    nothing = float("nan")
    alone = [nothing if item.alone.sqnr_db is None else item.alone.sqnr_db for item in pairs]
    spared = [nothing if item.all_but.sqnr_db is None else item.all_but.sqnr_db for item in pairs]
    axes.plot(alone, places, "o", mfc="none", mec=BEFORE, mew=1.5, ms=7, label="this layer alone rounded")
    axes.plot(spared, places, "s", color=AFTER, ms=5, label="all but this layer rounded")
    if found.all_rounded.sqnr_db is not None:
        axes.axvline(found.all_rounded.sqnr_db, color=INK, lw=0.8, label="all rounded")
    axes.set_xlabel("SQNR of the outputs (dB)")
    _legend(figure, 2)
    return figure


def draw_noise(ratios: Mapping[str, Mapping[str, float | None]], layers: Sequence[str]) -> Figure:
    """Draw the SQNR behind each layer in dB, with one line per deployment.

    A layer without noise has no mark.

    Args:
      ratios: SQNR in dB by deployment and layer.
      layers: Layers in the order of the network.
    """
    figure, axes = _lines(layers)
    colours = (BEFORE, AFTER, *OTHER_COLOURS, *("0.5",) * len(ratios))
    for mark, colour, (name, values) in zip("os^vDPX*" * len(ratios), colours, ratios.items(), strict=False):
        known = {layer: ratio for layer in layers if (ratio := values.get(layer)) is not None}
        axes.plot(
            list(known.values()),
            [layers.index(layer) for layer in known],
            f"{mark}-",
            color=colour,
            ms=5,
            lw=1.0,
            label=name,
        )
    axes.set_xlabel("SQNR of the layer's output (dB)")
    _legend(figure, 2)
    return figure


def draw_kernel_tails(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> Figure:
    """Draw each layer's largest weight over the root mean square of all, on a logarithmic axis.

    Args:
      before, after: Weights `(size,)` by layer, in the same order.
    """
    figure, axes = _lines(list(before))
    places = range(len(before))
    ends = [[tail(values) for values in side.values()] for side in (before, after)]
    axes.hlines(places, ends[0], ends[1], color="0.75", lw=1.5)
    axes.plot(ends[0], places, "o", mfc="none", mec=BEFORE, mew=1.5, ms=8, label="before")
    axes.plot(ends[1], places, "s", color=AFTER, ms=4, label="after the advice")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    shown = [end for side in ends for end in side if end > 0] or [1.0]
    axes.set_xlim(min(shown) / 1.3, max(shown) * 1.3)
    axes.set_xlabel("largest |w| / root mean square")
    _legend(figure, 2)
    return figure


def draw_input_ranges(found: Diagnosis) -> Figure:
    """Draw the values that each layer reads, and its grid before and after the advice.

    Each layer is scaled by the largest magnitude of these three ranges, so that narrow ranges can be seen
    beside wide ones.
    """
    layers = [name for name in found.activations if name in found.before.bounds]
    figure, axes = _lines(layers)
    spans = {
        "values on these images": [
            (found.activations[name].low, found.activations[name].high) for name in layers
        ],
        "grid before": [found.before.bounds[name] for name in layers],
        "grid after": [found.after.bounds[name] for name in layers],
    }
    most = [max(abs(end) for span in spans.values() for end in span[i]) or 1.0 for i in range(len(layers))]
    places = np.arange(len(layers))
    styles = ((0.0, 0.62, "0.8"), (-0.15, 0.2, BEFORE), (0.15, 0.2, AFTER))
    for (name, ends), (shift, height, colour) in zip(spans.items(), styles, strict=True):
        low, high = (np.array(side) / most for side in zip(*ends, strict=True))
        axes.barh(places + shift, high - low, height, low, color=colour, label=name)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_xlim(-1.04, 1.04)
    axes.set_xlabel("value / largest magnitude")
    _legend(figure, 3)
    return figure


def _lines(layers: Sequence[str]) -> tuple[Figure, Axes]:
    """Make a panel with one line per layer, the first on top."""
    figure = canvas(WIDTH, LINE * max(len(layers), LEAST_LINES) + 1.0)
    axes = figure.add_subplot()
    short = [name if len(name) <= NAME else f"...{name[-NAME:]}" for name in layers]
    axes.set_yticks(range(len(layers)), [name.replace("$", r"\$") for name in short])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=8)
    return figure, axes


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
