"""Report one training run as one HTML file: what was trained, what became of it, and how to repeat it.

`run_page` builds the page from sections. Each section is a function of what the folder of the run holds.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from qt_jax.export.encodings import Ranges
from qt_jax.records import Record
from qt_jax.reporting.costs import provenance, speed_table
from qt_jax.reporting.deployment_figures import draw_drops
from qt_jax.reporting.figures import INK, method_colour, to_svg
from qt_jax.reporting.page import to_html
from qt_jax.reporting.pivot import (
    METHOD_TITLES,
    METRICS,
    REFERENCE,
    Column,
    DeploymentTable,
    Row,
    Seeds,
    arrange,
    drops,
    precision,
    title,
)
from qt_jax.reporting.report import head_to_head, headline
from qt_jax.reporting.run_figures import (
    Series,
    draw_curves,
    draw_histogram,
    draw_ranges,
    draw_reliability,
    draw_tails,
    draw_threshold,
    tail,
)
from qt_jax.reporting.statistics import representative
from qt_jax.reporting.tables import (
    ABSENT,
    MINUS,
    escaped,
    failures,
    full_table,
    markdown_table,
    to_markdown,
    with_spread,
)

MOST_PANELS = 48
"""Number of layers beyond which only those of the heaviest tails have a panel."""

MOST_ROWS = 30
"""Rows of one heat map. More rows become several maps, so that each fits a sheet of paper."""

COLOUR_NAMES = {"quant-trim": "blue", "float": "orange"}
"""Name of the colour of each known method on the page."""

Weights = Mapping[str, Mapping[str, np.ndarray]]
"""Values `(size,)` of each kernel, by method and layer."""


class Section(NamedTuple):
    """Hold Markdown, and the SVG of each picture that it names."""

    text: str
    drawings: Mapping[str, str]


NO_RECORDS = Section("There are no records yet: the run has not deployed its networks.", {})


@dataclasses.dataclass(frozen=True, eq=False)
class RunContents:
    """Hold what the folder of a run contains.

    What the folder lacks is empty or None, and its section says so.

    Attributes:
      name: Name of the run.
      folder: Folder of the pictures of `diagnosis` and `pictures`.
      facts: What was trained, as values by name, in the order to show.
      metrics: Rows of metrics.jsonl.
      records: Records of this run.
      others: Records of further backends.
      metric: Metric that the run is judged by, a key of `METRICS`.
      validation: Prefix of the keys of this metric in `metrics`.
      weights: Values `(size,)` of each kernel, by method and layer.
      weights_source: Sentence that says where the weights are from.
      ranges: Ranges of the Quant-Trim network's exported graph.
      pictures: Further pictures of the folder, by caption.
      diagnosis: Markdown of a diagnosis.
      diagnosis_drawings: SVG of each picture of `diagnosis`, as `qt_jax.reporting.figures.to_svg` makes it.
    """

    name: str
    folder: Path
    facts: Mapping[str, str]
    metrics: Sequence[Record] = ()
    records: Sequence[Record] = ()
    others: Sequence[Record] = ()
    metric: str = "top1"
    validation: str = "validation"
    weights: Weights = dataclasses.field(default_factory=dict)
    weights_source: str = ""
    ranges: Ranges | None = None
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    diagnosis: str | None = None
    diagnosis_drawings: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_page(run: RunContents) -> str:
    """Write the report of `run` as one HTML file.

    Raises:
      InvalidInput: A record is not a deployment record, or holds decisions that cannot be decoded.

    >>> page = run_page(RunContents("a run", Path("."), {"data set": "digits"}))
    >>> "digits" in page, "no records yet" in page
    (True, True)
    """
    sections = {
        "Results": _results(run),
        "Training": training_section(run.metrics, run.metric, run.validation, _layers(run)),
        "Weight tails": weight_section(run.weights, run.weights_source),
        "Activation ranges": range_section(run.ranges),
        "Vendors": _vendors(run),
        "Calibration": _calibration(run),
        "Diagnosis": _diagnosis(run.diagnosis, run.diagnosis_drawings),
        "Reproduce": _reproduce(run),
    }
    heading = f"Run {run.name}"
    parts = [f"# {escaped(heading)}"]
    drawings: dict[str, str] = {}
    for name, section in sections.items():
        if section is not None:
            parts.append(f"## {name}\n\n{section.text}")
            drawings |= section.drawings
    return to_html("\n\n".join(parts) + "\n", heading, run.folder, drawings)


def _layers(run: RunContents) -> list[str]:
    """Return the layers in the order of the network."""
    return list(dict.fromkeys(layer for values in run.weights.values() for layer in values))


def _results(run: RunContents) -> Section:
    """Show what was trained, and FP32, the worst INT8 and the worst INT4 row of each network."""
    facts = markdown_table(
        ["trained", ""], ([escaped(key), escaped(text)] for key, text in run.facts.items()), words=2
    )
    if not run.records:
        return Section("\n\n".join([facts, NO_RECORDS.text]), {})
    networks = {record.get("checkpoint") for record in run.records}
    mine = arrange([*run.records, *(r for r in run.others if r.get("checkpoint") in networks)])
    header = [f"{METRICS[run.metric]} in %", *(title(column.method) or "network" for column in mine.columns)]
    rows = [["FP32", *(_reached(mine.seeds(column, REFERENCE), run.metric) for column in mine.columns)]]
    for name in ("INT8", "INT4"):
        rows.append([f"worst {name}", *(_worst(mine, column, name, run.metric) for column in mine.columns)])
    note = (
        "In brackets: points below the network's own FP32 on the same images, and the row. Rows on integer "
        "grids in all layers; INT4: weights at 4 bits, activations at any width."
    )
    parts = [markdown_table(header, rows), note, facts]
    if run.metric != "top1":
        parts.insert(2, to_markdown(run.records, run.metric))
    parts += [f"![{escaped(text)}]({name})" for text, name in run.pictures.items()]
    return Section("\n\n".join(parts), {})


def _reached(seeds: Seeds, metric: str) -> str:
    return with_spread([record[metric] for record in seeds.values() if record.get(metric) is not None], 100)


def _worst(deployment: DeploymentTable, column: Column, name: str, metric: str) -> str:
    """Write the row with the largest drop of one precision: its metric, its drop and its name."""
    own = deployment.seeds(column, REFERENCE)
    found: dict[Row, float] = {}
    for row, seeds in deployment.cells[column].items():
        if precision(seeds) != name or _reached(seeds, metric) == ABSENT:
            continue
        lost = drops(seeds) if metric == "top1" else _lost(own, seeds, metric)
        if lost:
            found[row] = fmean(lost)
    if not found:
        return ABSENT
    worst = max(found, key=found.__getitem__)
    drop = f"{100 * found[worst]:.2f}".replace("-", MINUS)
    counts = {
        record.get("n") for seeds in (own, deployment.seeds(column, worst)) for record in seeds.values()
    }
    images = f", on {min(filter(None, counts))} images" if len(counts) > 1 else ""
    name = str(worst) if worst.backend != REFERENCE.backend else worst.scheme
    return f"{_reached(deployment.seeds(column, worst), metric)} ({drop}; {escaped(name)}{images})"


def _lost(own: Seeds, seeds: Seeds, metric: str) -> list[float]:
    """Return the losses against the FP32 record of the same seed and number of images."""
    both = [(own[seed], record) for seed, record in seeds.items() if seed in own]
    return [a[metric] - b[metric] for a, b in both if a.get("n") == b.get("n") and a.get(metric) is not None]


def training_section(
    metrics: Sequence[Record], metric: str, validation: str, layers: Sequence[str] = ()
) -> Section:
    """Draw loss, accuracy, lambda, learning rate, and tau of each layer over training.

    Args:
      metrics: Rows of metrics.jsonl, one per epoch and method. Of two for the same epoch the later one
        counts.
      metric: Key of `METRICS`.
      validation: Prefix of the metric's keys, such as `validation` for `validation_fp32`.
      layers: Names of layers in the order of the network. Others follow in the order of `metrics`.
    """
    if not metrics:
        return Section("metrics.jsonl holds no epoch yet.", {})
    found = {row["method"]: None for row in metrics if row.get("method")}
    methods = sorted(
        found, key=lambda method: list(METHOD_TITLES).index(method) if method in METHOD_TITLES else 9
    )
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


def _points(rows: Mapping[int, Record], key: str) -> tuple[list[float], list[float]] | None:
    """Return the epochs and values of one key; None if there are none."""
    found = {epoch: row[key] for epoch, row in sorted(rows.items()) if row.get(key) is not None}
    return (list(found), list(found.values())) if found else None


def _percent(series: Sequence[Series]) -> list[Series]:
    return [line._replace(values=[100 * value for value in line.values]) for line in series]


def _thresholds(
    epochs: Mapping[str, Mapping[int, Record]], order: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Return epochs and tau of each layer, for the first method that has any."""
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


def weight_section(weights: Weights, source: str) -> Section:
    """Show the largest weight over the root mean square, and a histogram for each layer."""
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
    """Show the grid of every activation of the exported graph."""
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


def _vendors(run: RunContents) -> Section:
    """Show heat maps and tables of every row, for all backends that have been tried."""
    records = [*run.records, *run.others]
    if not records:
        return NO_RECORDS
    deployment = arrange(records)
    rows = deployment.rows
    names = {f"drops-{start}.svg": start for start in range(0, len(rows), MOST_ROWS)}
    drawn = {
        name: to_svg(
            partial(draw_drops, deployment._replace(rows=rows[start : start + MOST_ROWS])), f"drops-{start}"
        )
        for name, start in names.items()
    }
    last = len(rows)
    maps = [
        f"![Drop of top-1, rows {start + 1} to {min(start + MOST_ROWS, last)} of {last}]({name})"
        for name, start in names.items()
    ]
    failed = failures(deployment)
    parts = [
        headline(deployment),
        "### Heat map",
        *maps,
        "### All rows",
        full_table(deployment),
        f"### Rows without a number\n\n{failed}" if failed else None,
        f"### Speed, energy and cost\n\n{speed}" if (speed := speed_table(deployment)) else None,
        f"### Quant-Trim against its float twin\n\n{duel}" if (duel := head_to_head(deployment)) else None,
    ]
    return Section("\n\n".join(p for p in parts if p), {key: svg for key, svg in drawn.items() if svg})


def _calibration(run: RunContents) -> Section:
    """Show reliability diagrams of each network, and ECE, Brier score and NLL of every row."""
    records = [record for record in run.records if record.get("ece") is not None]
    if not records:
        return Section("No record holds a calibration error.", {})
    deployment = arrange(records)
    parts = [
        "Top softmax probability against accuracy in its bin; grey: the share of images in it. A calibrated "
        "network lies on the dashed line. ECE: mean distance from it over the images. FP32 and the rows of "
        "the smallest, the median and the largest ECE of each network."
    ]
    drawings = {}
    for index, column in enumerate(deployment.columns):
        pictures: list[str] = []
        for item in representative(deployment, column):
            name = f"reliability-{index}-{len(pictures)}.svg"
            draw = partial(draw_reliability, item, method_colour(column.method, index))
            if svg := to_svg(draw, name.removesuffix(".svg")):
                drawings[name] = svg
                pictures.append(f"![{escaped(deployment.name(column))}, {item.reason}]({name})")
        if pictures:
            parts += [f"### {escaped(deployment.name(column))}", "\n".join(pictures)]
    scores = {"ECE %": ("ece", 100, 2), "Brier": ("brier", 1, 4), "NLL": ("nll", 1, 4)}
    header = ["row", *(f"{escaped(deployment.name(c))} {key}" for c in deployment.columns for key in scores)]
    rows = [
        [
            escaped(row),
            *(
                with_spread([r[key] for r in seeds.values() if r.get(key) is not None], scale, digits)
                for column in deployment.columns
                for seeds in [deployment.seeds(column, row)]
                for key, scale, digits in scores.values()
            ),
        ]
        for row in deployment.rows
    ]
    parts += ["### Scores", "Smaller is better.", markdown_table(header, rows)]
    return Section("\n\n".join(parts), drawings)


def _diagnosis(markdown: str | None, drawings: Mapping[str, str]) -> Section | None:
    """Drop the title of `markdown`, and move its other headings one level down."""
    if markdown is None:
        return None
    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if fenced or not re.match(r"#{1,5} ", line):
            lines.append(line)
        elif not line.startswith("# "):
            lines.append(f"#{line}")
    return Section("\n".join(lines).strip(), drawings)


def _reproduce(run: RunContents) -> Section:
    """Show the command, the commit, the machines and the versions."""
    commands = dict.fromkeys(record["command"] for record in run.records if record.get("command"))
    fence = "\n".join(commands)
    parts = [f"```\n{fence}\n```" if commands else "No record says which command made this run."]
    training: dict[tuple[str, ...], None] = {}
    for row in run.metrics:
        versions = ", ".join(f"{name} {version}" for name, version in (row.get("versions") or {}).items())
        cells = (row.get("method"), row.get("commit"), row.get("device"), row.get("devices"), versions)
        training.setdefault(tuple(escaped(cell or ABSENT) for cell in cells))
    if training:
        table = markdown_table(["trained", "commit", "device", "devices", "versions"], training, words=5)
        parts += ["### Training", table]
    if run.records:
        parts += ["### Deployment", provenance(arrange([*run.records, *run.others]))]
    return Section("\n\n".join(parts), {})


def _pictures(captions: Mapping[str, str]) -> str:
    return "\n".join(f"![{escaped(caption)}]({name})" for name, caption in captions.items())
