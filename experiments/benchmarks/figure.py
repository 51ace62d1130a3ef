"""The look of the benchmarks' figures."""

from pathlib import Path

from matplotlib.figure import Figure

from qt_jax.reporting.heatmaps import save


def finish(figure: Figure, path: Path) -> None:
    """Opens the panels, rules light lines behind what they show, and writes the PNG; replaced if there."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    save(figure, path)
