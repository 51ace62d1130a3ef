"""Draw figures from records, as PNG or as SVG for the HTML report.

`canvas` makes an empty figure, `save_figure` writes it as PNG, and `to_svg` turns it into an element of a
page. In the SVG every grey and every series colour that the figures of this package use becomes a CSS
variable of `qt_jax.reporting.page`: dark ink on paper, light ink in the dark. Text stays text, in the font of
the page.

`summary_figure` draws one picture of a run: accuracy by scheme, the curriculum, and the weights.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from qt_jax.files import staged
from qt_jax.records import Record
from qt_jax.reporting.pivot import METRICS, Comparison, compare, measured, spread, title

DPI = 110
"""Pixels per inch of a PNG."""

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
COLOURS = {"quant-trim": "#0072B2", "float": "#D55E00"}
"""Colour of each known method."""

OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of other methods."""

MARKERS = {"quant-trim": "o", "float": "s"}
"""Marker of each known method."""

INK = "#333333"
"""Grey of text and axes."""

SERIES = dict(
    zip(
        (*COLOURS.values(), *OTHER_COLOURS),
        ("blue", "orange", "green", "pink", "amber", "sky"),
        strict=True,
    )
)
"""Maps a colour of a figure to a CSS variable of the page."""

GREYS = {"#e6e6e6": "line", "#cccccc": "line", "#bfbfbf": "bar", "#ededed": "head", "#f2f2f2": "head"}
"""Maps a grey of a figure to a CSS variable of the page."""

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "font.size": 9,
    "svg.fonttype": "none",
}
"""Matplotlib's settings for SVG."""


def canvas(width: float, height: float) -> Figure:
    """Make an empty figure of `width` by `height` inches, with constrained layout and margins."""
    figure = Figure((width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure to `path` as a PNG, whole or not at all, and return the path."""
    with staged(path) as scratch:
        figure.savefig(scratch, format="png")
    return path


def to_svg(draw: Callable[[], Figure | None], name: str) -> str | None:
    """Return what `draw` draws as an `<svg>` element; None if it draws nothing.

    Args:
      draw: Makes a new figure. It is called with the page's style set.
      name: Makes the ids of this drawing differ from those of others on the page.

    >>> svg = to_svg(lambda: Figure(figsize=(2, 1)), "empty")
    >>> svg.startswith("<svg"), "--width: 144" in svg
    (True, True)
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = draw()
        if figure is None:
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return _on_page(text.getvalue())


def _on_page(svg: str) -> str:
    """Reduce an SVG file to its bare element, and make its colours variables of the page.

    The prologue, metadata, comments, and ids that nothing refers to are dropped.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z]\w*_\d+"', "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    width = re.search(r'width="([\d.]+)pt"', svg)
    assert width is not None, "matplotlib states the width of an SVG"
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg style="--width: {float(width[1]):.0f}"', 1)
    svg = re.sub(r"(font: [^';\"]*?)'DejaVu Sans'[^;\"]*", r"\1system-ui, sans-serif", svg)
    for colour, variable in GREYS.items() | {(c.lower(), v) for c, v in SERIES.items()}:
        svg = svg.replace(colour, f"var(--{variable})")
    svg = svg.replace(INK, "currentColor")
    # White in front of a coloured cell stays white; white lines and boxes are the paper.
    svg = re.sub(r"<(?!text)[^>]*#ffffff[^>]*>", lambda tag: tag[0].replace("#ffffff", "var(--paper)"), svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def method_colour(method: str, index: int) -> str:
    """Return the colour of a known method in every figure; for other methods the colour at `index`."""
    return COLOURS.get(method, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def over_rms(values: np.ndarray) -> np.ndarray:
    """Divide `values` by their root mean square, in float64; a dead layer stays zero.

    >>> over_rms(np.float32([3, -3])).tolist()
    [1.0, -1.0]
    """
    values = np.asarray(values, np.float64).ravel()
    return values / max(float(np.sqrt(np.mean(values**2))), float(np.finfo(np.float32).tiny))


def summary_figure(
    records: Sequence[Record],
    schedule: tuple[np.ndarray, np.ndarray],
    weights: Mapping[str, Mapping[str, np.ndarray]],
    path: str | Path,
    history: Sequence[Mapping[str, Any]] | None = None,
    metric: str = "top1",
) -> None:
    """Write the summary of a run as a PNG of 1650 x 1350 pixels.

    Args:
      records: Records of one run, as `qt_jax.reporting.tables` takes them.
      schedule: Steps `(t,)`, and lambda at each step `(t,)`.
      weights: Values `(size,)` of each kernel, by method and layer path. Each layer is divided by its root
        mean square, so that layers of different gain can share a histogram.
      path: File to write. An existing one is replaced.
      history: Validation accuracy of the Quant-Trim run, one mapping per epoch with "epoch" (epochs
        finished), "fp32_top1" and "fake_quant_top1" as fractions. For another metric, its key replaces
        "top1".
      metric: "top1" or "miou".

    Raises:
      InvalidInput: The records cannot be compared, as `qt_jax.reporting.pivot.compare` says.

    >>> import os, tempfile
    >>> record = {"backend": "b", "scheme": "fp32", "method": "float", "seed": 0, "top1": 0.5}
    >>> path = os.path.join(tempfile.mkdtemp(), "summary.png")
    >>> summary_figure([record], (np.arange(3), np.zeros(3)), {"float": {"layer": np.ones(8)}}, path)
    >>> os.path.exists(path)
    True
    """
    comparison = compare(records)
    figure = Figure(figsize=(11, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, height_ratios=(1.35, 0.7, 0.5))
    _accuracy_by_scheme(figure.add_subplot(grid[0, :]), comparison, metric)
    if history:
        accuracy = figure.add_subplot(grid[1, 0])
        curriculum = figure.add_subplot(grid[2, 0], sharex=accuracy)
        accuracy.tick_params(labelbottom=False)
        _validation(accuracy, history, metric)
    else:
        curriculum = figure.add_subplot(grid[1:, 0])
        curriculum.set_title("Curriculum", loc="left")
    _curriculum(curriculum, schedule, history)
    _weight_distribution(figure.add_subplot(grid[1:, 1]), weights)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=150)


def _accuracy_by_scheme(axes: Axes, comparison: Comparison, metric: str) -> None:
    """Draw one dot per method and scheme at the mean over seeds, with a bar of one standard deviation."""
    shift = 0.16
    for index, method in enumerate(comparison.methods):
        centre = (index - (len(comparison.methods) - 1) / 2) * shift
        colour = method_colour(method, index)
        for place, scheme in enumerate(comparison.schemes):
            values = list(measured(comparison.cells[method].get(scheme, {}), metric).values())
            if not values:
                continue
            mean, deviation = spread([100 * value for value in values])
            axes.errorbar(
                place + centre,
                mean,
                yerr=deviation,
                fmt=MARKERS.get(method, "^"),
                color=colour,
                markersize=7,
                capsize=3,
            )
            axes.annotate(
                f"{mean:.1f}",
                (place + centre, mean),
                (6 if centre > 0 else -6, 0),
                textcoords="offset points",
                horizontalalignment="left" if centre > 0 else "right",
                verticalalignment="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
            if scheme == comparison.reference:
                axes.axhline(mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.plot([], [], MARKERS.get(method, "^"), color=colour, label=title(method))
    name = "accuracy" if metric == "top1" else METRICS[metric]
    axes.set_title(f"Test {name} by scheme (dashed: the network's own FP32)", loc="left")
    axes.set_ylabel(f"{METRICS[metric]} (%)")
    axes.set_xticks(
        range(len(comparison.schemes)),
        [name.replace("-", "\n").replace(" ", "\n") for name in comparison.schemes],
    )
    axes.set_xlim(-0.5, len(comparison.schemes) - 0.5)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower left")


def _validation(axes: Axes, history: Sequence[Mapping[str, Any]], metric: str) -> None:
    epochs = [row["epoch"] for row in history]
    for path, label, style in (("fp32", "FP32", "-"), ("fake_quant", "fake-quantized", "--")):
        colour = COLOURS["quant-trim"] if style == "-" else INK
        axes.plot(
            epochs, [100 * row[f"{path}_{metric}"] for row in history], style, color=colour, label=label
        )
    axes.set_title("Quant-Trim over training", loc="left")
    axes.set_ylabel(f"validation {METRICS[metric]} (%)")
    axes.legend(frameon=False, loc="lower right")


def _curriculum(
    axes: Axes, schedule: tuple[np.ndarray, np.ndarray], history: Sequence[Mapping[str, Any]] | None
) -> None:
    """Draw lambda over steps, or over epochs where a history gives their number."""
    steps, lambdas = (np.asarray(values) for values in schedule)
    if history:
        steps = steps * (history[-1]["epoch"] / steps[-1])
    axes.plot(steps, lambdas, color=INK)
    axes.fill_between(steps, lambdas, color=INK, alpha=0.12)
    axes.set_ylim(-0.03, 1.06)
    axes.set_ylabel("λ")
    axes.set_xlabel("epoch" if history else "step")


def _weight_distribution(axes: Axes, weights: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    normalised = {}
    for method in sorted(
        weights, key=lambda name: (list(COLOURS).index(name) if name in COLOURS else 9, name)
    ):
        normalised[method] = np.concatenate([over_rms(values) for values in weights[method].values()])
    limit = max(np.abs(values).max() for values in normalised.values())
    bins = np.linspace(-limit, limit, 121)
    for index, (method, values) in enumerate(normalised.items()):
        label = f"{title(method)}: largest |w| {np.abs(values).max():.1f}"
        axes.hist(
            values,
            bins,
            histtype="step",
            log=True,
            linewidth=1.5,
            color=method_colour(method, index),
            label=label,
        )
    axes.set_title("Weight distribution", loc="left")
    axes.set_xlabel("weight / root mean square of its layer")
    axes.set_ylabel("number of weights")
    axes.set_ylim(top=axes.get_ylim()[1] * 12)
    axes.legend(frameon=False, loc="upper center")
