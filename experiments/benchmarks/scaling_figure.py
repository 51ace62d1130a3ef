"""The figure of `experiments.benchmarks.scaling`: a column for each size that is varied, a row for a cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from experiments.benchmarks.figure import finish
from qt_jax.reporting.figures import COLOURS, INK
from qt_jax.reporting.heatmaps import canvas
from qt_jax.reporting.records import Record

NAMES = {
    "width": "width (channels)",
    "depth": "depth (layers)",
    "batch_size": "batch (images)",
    "resolution": "resolution (pixels)",
    "sample_size": "sub-sample (elements)",
}


def scaling_figure(axes: Mapping[str, Sequence[Record]], base: Mapping[str, int], path: Path) -> None:
    """Writes a PNG: ratio of step times, ratio of memory, seconds to compile.

    Args:
      axes: name of the size that is varied -> records in its order.
      base: the sizes from which each is varied; a vertical line marks them.
      path: replaced if there.
    """
    figure = canvas(15, 8.5)
    grid = figure.subplots(3, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, (name, rows) in zip(grid.T, axes.items(), strict=True):
        sizes = [row[name] for row in rows]
        _times(column[0], sizes, rows)
        column[1].plot(sizes, [row["peak_ratio"] for row in rows], "o-", color=COLOURS["quant-trim"])
        _compilation(column[2], sizes, rows)
        for panel in column:
            panel.axvline(base[name], color="0.85", zorder=0)
        column[2].set_xscale("log", base=2)
        column[2].set_xticks(sizes, [str(size) for size in sizes])
        column[2].minorticks_off()
        column[2].set_xlabel(NAMES[name])
    for panel in grid[:2].flat:
        panel.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    grid[0, 0].set_ylabel("step time\nQuant-Trim / faster FP32")
    grid[1, 0].set_ylabel("peak memory\nQuant-Trim / FP32")
    grid[2, 0].set_ylabel("compilation (s)")
    grid[2, 0].set_ylim(bottom=0)
    grid[2, 0].legend(frameon=False, loc="upper left")
    device = axes[next(iter(axes))][0]["accelerator"] or "CPU"
    figure.suptitle(
        f"Cost of Quant-Trim W8A8 over FP32, {device}: medians over rounds, bars from quartile to quartile"
    )
    finish(figure, path)


def _times(panel: Axes, sizes: Sequence[int], rows: Sequence[Record]) -> None:
    middle, low, high = ([row[f"ratio_to_faster_{end}"] for row in rows] for end in ("paired", "p25", "p75"))
    panel.vlines(sizes, low, high, color=COLOURS["quant-trim"], alpha=0.35, linewidth=5)
    panel.plot(sizes, middle, "o-", color=COLOURS["quant-trim"])


def _compilation(panel: Axes, sizes: Sequence[int], rows: Sequence[Record]) -> None:
    for key, label, colour, style in (
        ("compile_seconds", "Quant-Trim", COLOURS["quant-trim"], "o-"),
        ("fp32_compile_seconds", "FP32", COLOURS["float"], "s--"),
    ):
        panel.plot(sizes, [row[key] for row in rows], style, color=colour, label=label)
