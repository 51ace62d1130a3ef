"""Figures as SVG for the HTML report, in the colours of the page: dark ink on paper, light ink in the dark.

Every grey and every series colour that the figures of this package use becomes a CSS variable of
`qt_jax.reporting.page_template`. Text stays text, in the font of the page.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from qt_jax.reporting.figures import COLOURS, INK, OTHER_COLOURS

SERIES = dict(
    zip(
        (*COLOURS.values(), *OTHER_COLOURS),
        ("blue", "orange", "green", "pink", "amber", "sky"),
        strict=True,
    )
)
"""Colour of a figure -> variable of the page."""

GREYS = {"#e6e6e6": "line", "#cccccc": "line", "#bfbfbf": "bar", "#ededed": "head", "#f2f2f2": "head"}

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "font.size": 9,
    "svg.fonttype": "none",
}


def to_svg(draw: Callable[[], Figure | None], name: str) -> str | None:
    """What `draw` draws, as an `<svg>` element; None if it draws nothing.

    Args:
      draw: makes a new figure; it is called with the page's style set.
      name: makes the ids of this drawing differ from those of others on the page.

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
    """The bare element: no prologue, no metadata, no ids that nothing refers to, colours as variables."""
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
