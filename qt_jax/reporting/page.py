"""Turn a Markdown report into one HTML file that needs nothing else.

Pictures lie inside the file, and a click on a heading sorts a table. `PAGE` is the frame of every report: its
style on screens, in the dark, on phones and on paper, and its one script.
"""

import base64
import html
import itertools
import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #24292f; --quiet: #57606a; --line: #d8dce1; --head: #f2f4f6; --bar: #bcc3cb;
  --blue: #0072b2; --orange: #d55e00; --green: #00835f; --pink: #b0568a; --amber: #b87a00; --sky: #2a8fc7;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181d; --ink: #e4e7eb; --quiet: #a3abb5; --line: #3b424b; --head: #21262d; --bar: #59626d;
    --blue: #5ab4f0; --orange: #ff9248; --green: #3cc79f; --pink: #e39cc5; --amber: #f0b541; --sky: #8ccff5;
  }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; margin: 0; background: var(--paper); color: var(--ink); }
main { max-width: 76rem; padding: 1rem 1.25rem 4rem; min-width: 0; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 1rem 0; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
a { color: var(--blue); }
nav { position: sticky; top: 0; z-index: 1; display: flex; overflow-x: auto; white-space: nowrap;
  scrollbar-width: thin;
  background: var(--paper); border-bottom: 1px solid var(--line); padding: 0 .7rem; }
nav:empty { display: none; }
nav a { padding: .65rem .55rem; font-size: .87rem; text-decoration: none; color: var(--quiet); }
nav a:hover, nav a:focus { color: var(--ink); text-decoration: underline; }
:target { scroll-margin-top: 3rem; }
@media screen and (min-width: 68rem) {
  body:has(nav a) { display: grid; grid-template-columns: 12rem minmax(0, 1fr); }
  nav { flex-direction: column; align-self: start; max-height: 100vh; overflow: auto; white-space: normal;
    border: 0; padding: 1.6rem .5rem 1.6rem 1.1rem; }
  nav a { padding: .25rem .5rem; }
  :target { scroll-margin-top: .5rem; }
}
.scroll { overflow-x: auto; margin: .8rem 0; }
@media screen and (max-width: 48rem) {
  th:first-child, td:first-child { position: sticky; left: 0; max-width: 11rem; }
  td:first-child { background: var(--paper); }
}
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--head); cursor: pointer; vertical-align: bottom; font-weight: 600; }
th[aria-sort=ascending]::after { content: " \\25b4"; }
th[aria-sort=descending]::after { content: " \\25be"; }
td { max-width: 28rem; overflow-wrap: break-word; }
li, p, code { overflow-wrap: anywhere; }
pre { background: var(--head); padding: .6rem .8rem; white-space: pre-wrap; border-radius: 4px; }
.figures { display: grid; gap: .9rem .75rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr)); }
figure { margin: 0; min-width: 0; overflow-x: auto; }
figcaption { font-size: .8rem; line-height: 1.35; color: var(--quiet); overflow-wrap: anywhere; }
svg { display: block; height: auto; width: 100%; font-family: system-ui, sans-serif;
  min-width: calc(var(--width) * .95px); max-width: calc(var(--width) * 1.6px); }
img { display: block; min-width: min(100%, 44rem); max-width: max(100%, 44rem); height: auto;
  background: white; border-radius: 4px; }
@media print {
  @page { margin: 13mm; }
  :root { color-scheme: light; }
  body { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h1, h2, h3 { break-after: avoid; }
  figure, tr, pre, li { break-inside: avoid; }
  figure, .scroll { overflow: visible; }
  figcaption { break-before: avoid; }
  thead { display: table-header-group; }
  table { font-size: 7.5pt; width: 100%; }
  table:has(th:nth-child(12)) { font-size: 5.5pt; }
  th, td { padding: .12rem .25rem; max-width: none; }
  svg, img { min-width: 0; max-width: min(100%, calc(var(--width, 9999) * 1.25px)); max-height: 225mm; }
  th, .figures * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
</style>
</head>
<body>
<nav aria-label="Contents">$contents</nav>
<main>
$body
</main>
<script>
// A click on a heading sorts by that column, a second one backwards; cells without a number come last.
for (const head of document.querySelectorAll("th")) {
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest("table").tBodies[0];
    const key = row => {
      const text = row.cells[head.cellIndex].textContent.replace("\\u2212", "-").replaceAll(",", "");
      return [parseFloat(text), text];
    };
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (one, two) => {
      const [[a, s], [b, t]] = [key(one), key(two)];
      if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;
      return (down ? -1 : 1) * (isNaN(a) ? s.localeCompare(t) : a - b);
    };
    body.append(...[...body.rows].sort(order));
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
</script>
</body>
</html>
""")


def to_html(markdown: str, title: str, folder: Path, drawings: Mapping[str, str] | None = None) -> str:
    """Render `markdown` as a page with a table of contents of its second-level headings.

    Raw HTML in the Markdown stays text. A picture is one of `drawings`, or else a file of `folder`, which
    becomes a data URI on a white card. Its text is its caption. A paragraph of nothing but pictures is laid
    out as a grid that follows the width of the screen.

    Args:
      markdown: CommonMark with tables.
      title: Title of the page.
      folder: Folder of the pictures.
      drawings: SVG of each drawing by name, as `qt_jax.reporting.figures.to_svg` makes it.

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
    """Give every second-level heading an id; return the texts by id, in order."""
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
    """Return the pictures of a paragraph that holds nothing else; otherwise none."""
    children = [child for child in inline.children or () if child.type != "softbreak"]
    return children if all(child.type == "image" for child in children) else []


def _grid(pictures: Sequence[Token], drawings: Mapping[str, str]) -> str:
    """Return the opening tag of a grid; drawings share a line where there is room, files do not."""
    widths = [re.search(r"--width: (\d+)", drawings.get(_source(token), "")) for token in pictures]
    known = [int(width[1]) for width in widths if width]
    cell = f"{0.98 * max(known):.0f}px" if len(known) == len(pictures) > 1 else "100%"
    return f'<div class="figures" style="--cell: {cell}">'


def _source(token: Token) -> str:
    return unquote(str(token.attrs["src"]))


def _figure(token: Token, folder: Path, drawings: Mapping[str, str]) -> str:
    """Return a picture with its caption, or a line that says that its file is missing."""
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
