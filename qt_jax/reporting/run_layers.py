"""What training did, epoch by epoch and layer by layer: the sections of a run's report drawn from it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from qt_jax.export.encodings import Ranges
from qt_jax.reporting.cells import METHODS, METRICS, title
from qt_jax.reporting.deployment_tables import escaped, markdown_table
from qt_jax.reporting.figures import INK, method_colour
from qt_jax.reporting.ink import to_svg
from qt_jax.reporting.records import Record
from qt_jax.reporting.run_figures import (
    Series,
    draw_curves,
    draw_histogram,
    draw_ranges,
    draw_tails,
    draw_threshold,
    tail,
)
from qt_jax.reporting.tables import ABSENT, MINUS

MOST_PANELS = 48
"""Layers beyond which only those of the heaviest tails have a panel."""

COLOUR_NAMES = {"quant-trim": "blue", "float": "orange"}

Weights = Mapping[str, Mapping[str, np.ndarray]]
"""Method -> layer -> values `(size,)` of its kernel."""


class Section(NamedTuple):
    """Markdown, and the SVG of each picture that it names."""

    text: str
    drawings: Mapping[str, str]


def training_section(
    metrics: Sequence[Record], metric: str, validation: str, layers: Sequence[str] = ()
) -> Section:
    """Curves of loss, accuracy, lambda, learning rate, and a panel of tau for each layer.

    Args:
      metrics: rows of metrics.jsonl, one an epoch and method; of two for the same epoch the later counts.
      metric: a key of `METRICS`.
      validation: what its keys begin with, `validation` for `validation_fp32`.
      layers: their names in the order of the network; others follow as they come.
    """
    if not metrics:
        return Section("metrics.jsonl holds no epoch yet.", {})
    found = {row["method"]: None for row in metrics if row.get("method")}
    methods = sorted(found, key=lambda method: list(METHODS).index(method) if method in METHODS else 9)
    epochs = {
        method: {row["epoch"]: row for row in metrics if row.get("method") == method} for method in methods
    }
    colour = {method: method_colour(method, index) for index, method in enumerate(methods)}

    def lines(key: str, suffix: str = "", shade: str | None = None, style: str = "-") -> list[Series]:
        return [
            Series(title(method) + suffix, *points, shade or colour[method], style)
            for method in methods
            if (points := _points(epochs[method], key))
        ]

    name = METRICS[metric]
    panels = {
        "loss": ("Training loss, mean over the epoch", "loss", lines("loss")),
        "accuracy": (
            f"Validation {name}, in floating point and with fake quantization",
            f"validation {name} (%)",
            _percent(
                lines(f"{validation}_fp32", " FP32")
                + lines(f"{validation}_fake_quant", " fake-quantized", INK, "--")
            ),
        ),
        "lambda": (
            "Share λ of the fake quantization at the end of the epoch",
            "λ",
            [line for line in lines("lambda") if any(line.values)],
        ),
        "rate": ("Learning rate at the end of the epoch", "learning rate", lines("learning_rate")[:1]),
    }
    drawings = {
        f"curve-{key}.svg": to_svg(partial(draw_curves, series, label), f"curve-{key}")
        for key, (_, label, series) in panels.items()
        if series
    }
    captions = {f"curve-{key}.svg": caption for key, (caption, _, series) in panels.items() if series}
    parts = [_pictures(captions)]
    thresholds = _thresholds(epochs, layers)
    if thresholds:
        top = 1.12 * max(max(values) for _, values in thresholds.values())
        panel_names = {f"tau-{index}.svg": layer for index, layer in enumerate(thresholds)}
        drawings |= {
            key: to_svg(partial(draw_threshold, *thresholds[layer], (0, top)), key.removesuffix(".svg"))
            for key, layer in panel_names.items()
        }
        parts += [
            "### Threshold τ of reverse pruning",
            "The magnitude beyond which a weight of the layer is pulled back, by epoch, with its ends.",
            _pictures(panel_names),
        ]
    else:
        parts.append("metrics.jsonl names no threshold τ of reverse pruning.")
    return Section("\n\n".join(parts), {key: svg for key, svg in drawings.items() if svg})


def weight_section(weights: Weights, source: str) -> Section:
    """Largest weight over root mean square, as figure and table, and a histogram for each layer."""
    weights = {method: layers for method, layers in weights.items() if layers}
    if not weights:
        return Section("The folder holds neither checkpoints nor ONNX graphs to read weights from.", {})
    layers = list(dict.fromkeys(layer for values in weights.values() for layer in values))
    heaviest = {
        layer: max(tail(values[layer]) for values in weights.values() if layer in values) for layer in layers
    }
    chosen = set(sorted(layers, key=lambda layer: -heaviest[layer])[:MOST_PANELS])
    shown = [layer for layer in layers if layer in chosen]
    names = {f"weights-{index}.svg": layer for index, layer in enumerate(shown)}
    drawings = {"tails.svg": to_svg(lambda: draw_tails(weights), "tails")} | {
        key: to_svg(
            partial(draw_histogram, {m: values[layer] for m, values in weights.items() if layer in values}),
            key.removesuffix(".svg"),
        )
        for key, layer in names.items()
    }
    rows = [
        [
            escaped(layer),
            str(next(values[layer].size for values in weights.values() if layer in values)),
            *(f"{tail(values[layer]):.2f}" if layer in values else ABSENT for values in weights.values()),
        ]
        for layer in layers
    ]
    left_out = f" Shown: the {MOST_PANELS} of the heaviest tails." if len(layers) > MOST_PANELS else ""
    colours = " and ".join(f"{title(method)} ({COLOUR_NAMES.get(method, 'green')})" for method in weights)
    parts = [
        f"{source} The scale of a tensor is set by its largest weight: the further that lies from the root "
        "mean square, the fewer integers are left for all others.",
        _pictures({"tails.svg": "Largest weight of each layer over its root mean square"}),
        markdown_table(["layer", "weights", *(f"{title(m)} max/rms" for m in weights)], rows),
        "### Distribution of each layer",
        f"Number of weights (logarithmic) by weight over root mean square: {colours}.{left_out}",
        _pictures(names),
    ]
    return Section("\n\n".join(parts), {key: svg for key, svg in drawings.items() if svg})


def range_section(ranges: Ranges | None) -> Section:
    """The grid of every activation of the exported graph."""
    if ranges is None:
        return Section("The folder holds no model.ranges.json, the ranges that training learns.", {})
    kernels = set(ranges.kernels.values())
    tensors = {name: grid for name, grid in ranges.tensors.items() if name not in kernels}
    rows = [
        [
            escaped(name),
            grid.source,
            f"{round(min(grid.low), 6) + 0.0:.4g}".replace("-", MINUS),
            f"{round(max(grid.high), 6) + 0.0:.4g}".replace("-", MINUS),
            f"{max(grid.scale):.4g}",
            str(grid.bits),
        ]
        for name, grid in tensors.items()
    ]
    svg = to_svg(lambda: draw_ranges(tensors), "ranges") if tensors else None
    parts = [
        "Tensors of the exported graph in their order. Learned: the range that the layer reading the tensor "
        "kept in training. Calibrated: minimum and maximum on the calibration images, for tensors that no "
        "quantized layer reads alone.",
        _pictures({"ranges.svg": "Range of each activation"} if svg else {}),
        markdown_table(["tensor", "range", "min", "max", "step", "bits"], rows, words=2),
    ]
    return Section("\n\n".join(part for part in parts if part), {"ranges.svg": svg} if svg else {})


def _pictures(captions: Mapping[str, str]) -> str:
    return "\n".join(f"![{escaped(caption)}]({name})" for name, caption in captions.items())


def _points(rows: Mapping[int, Record], key: str) -> tuple[list[float], list[float]] | None:
    """Epochs and values where there are any."""
    found = {epoch: row[key] for epoch, row in sorted(rows.items()) if row.get(key) is not None}
    return (list(found), list(found.values())) if found else None


def _percent(series: Sequence[Series]) -> list[Series]:
    return [line._replace(values=[100 * value for value in line.values]) for line in series]


def _thresholds(
    epochs: Mapping[str, Mapping[int, Record]], order: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Layer -> epochs and tau, of the first method that has any."""
    for rows in epochs.values():
        named = dict.fromkeys(layer for row in rows.values() for layer in row.get("tau") or {})
        layers = [layer for layer in order if layer in named]
        layers += [layer for layer in named if layer not in layers]
        if layers:
            by_layer = {
                layer: {epoch: {"tau": (row.get("tau") or {}).get(layer)} for epoch, row in rows.items()}
                for layer in layers
            }
            found = {layer: _points(taus, "tau") for layer, taus in by_layer.items()}
            return {layer: points for layer, points in found.items() if points}
    return {}
