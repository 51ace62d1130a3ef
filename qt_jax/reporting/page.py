"""A Markdown report as one HTML file that needs nothing else: pictures inside, tables sorted by a click."""

import base64
import html
import itertools
import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from qt_jax.reporting.page_template import PAGE


def to_html(markdown: str, title: str, folder: Path, drawings: Mapping[str, str] | None = None) -> str:
    """`markdown` as a page with a table of contents of its second-level headings. Raw HTML in it stays text.

    A picture is one of `drawings` or else a file of `folder`, which becomes a data URI on a white card; its
    text is its caption. A paragraph of nothing but pictures is laid out as a grid that follows the width of
    the screen.

    Args:
      markdown: CommonMark with tables.
      title: of the page.
      folder: where the pictures lie.
      drawings: name of a picture -> its SVG, as `qt_jax.reporting.ink.to_svg` makes it.

    >>> page = to_html("# Report\\n\\n## Results", "Report", Path("."))
    >>> '<a href="#results">Results</a>' in page
    True
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    shown = drawings or {}

    def image(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return _figure(tokens[index], folder, shown)

    renderer: Any = parser.renderer

    def paragraph_open(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        pictures = _pictures(tokens[index + 1])
        return _grid(pictures, shown) if pictures else renderer.renderToken(tokens, index, options, env)

    def paragraph_close(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        pictures = _pictures(tokens[index - 1])
        return "</div>\n" if pictures else renderer.renderToken(tokens, index, options, env)

    renderer.rules |= {
        "image": image,
        "paragraph_open": paragraph_open,
        "paragraph_close": paragraph_close,
        "table_open": lambda *_: '<div class="scroll"><table>\n',
        "table_close": lambda *_: "</table></div>\n",
    }
    tokens = parser.parse(markdown)
    contents = "\n".join(
        f'<a href="#{anchor}">{html.escape(text)}</a>' for anchor, text in _anchored(tokens).items()
    )
    body = renderer.render(tokens, parser.options, {})
    return PAGE.substitute(title=html.escape(title), contents=contents, body=body)


def _anchored(tokens: Sequence[Token]) -> dict[str, str]:
    """Gives every second-level heading an id; returns the texts by id, in order."""
    found: dict[str, str] = {}
    for heading, inline in itertools.pairwise(tokens):
        if heading.type == "heading_open" and heading.tag == "h2":
            text = "".join(child.content for child in inline.children or ())
            slug = re.sub(r"\W+", "-", text.lower()).strip("-") or "section"
            anchor = slug if slug not in found else f"{slug}-{len(found)}"
            heading.attrSet("id", anchor)
            found[anchor] = text
    return found


def _pictures(inline: Token) -> list[Token]:
    """The pictures of a paragraph that holds nothing else, else none."""
    children = [child for child in inline.children or () if child.type != "softbreak"]
    return children if all(child.type == "image" for child in children) else []


def _grid(pictures: Sequence[Token], drawings: Mapping[str, str]) -> str:
    """The opening tag of a grid: drawings share a line where there is room, files have one of their own."""
    widths = [re.search(r"--width: (\d+)", drawings.get(_source(token), "")) for token in pictures]
    known = [int(width[1]) for width in widths if width]
    cell = f"{0.98 * max(known):.0f}px" if len(known) == len(pictures) > 1 else "100%"
    return f'<div class="figures" style="--cell: {cell}">'


def _source(token: Token) -> str:
    return unquote(str(token.attrs["src"]))


def _figure(token: Token, folder: Path, drawings: Mapping[str, str]) -> str:
    """A picture with its caption; a line that says so where there is no such file."""
    name, text = _source(token), html.escape("".join(part.content for part in token.children or ()))
    caption = f"<figcaption>{text}</figcaption>"
    if name in drawings:
        drawing = drawings[name].replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
        return f"<figure>{drawing}{caption}</figure>"
    try:
        data = base64.b64encode((folder / name).read_bytes()).decode()
    except OSError:
        return f"<figure><figcaption>{text}: {html.escape(name)} is not there</figcaption></figure>"
    kind = mimetypes.guess_type(name)[0] or "image/png"
    return f'<figure><img alt="{text}" src="data:{kind};base64,{data}">{caption}</figure>'
