"""A Markdown report as one HTML file that needs nothing else: pictures inside, tables sorted by a click."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #d5d5d5; --head: #f2f2f2; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --head: #2a2a2a; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; }
.scroll { display: block; overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--head); cursor: pointer; }
td { max-width: 28rem; overflow-wrap: break-word; }
img { min-width: min(100%, 44rem); max-width: max(100%, 44rem); height: auto; background: white; }
li, p, code { overflow-wrap: anywhere; }
</style>
</head>
<body>
$body
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


def to_html(markdown: str, title: str, folder: Path) -> str:
    """`markdown` as a page; its pictures, files of `folder`, become data URIs. Raw HTML in it stays text.

    >>> "<h1>Report</h1>" in to_html("# Report", "Report", Path("."))
    True
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(self: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        data = base64.b64encode((folder / str(token.attrs["src"])).read_bytes()).decode()
        text = html.escape(token.content)
        return f'<span class="scroll"><img alt="{text}" src="data:image/png;base64,{data}"></span>'

    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return PAGE.substitute(title=html.escape(title), body=parser.render(markdown))
