"""Write equations as MathML, and resolve links to files outside `docs/`, when mkdocs builds the pages.

The browser draws MathML without any help, so the site needs neither a script nor the network for equations.
"""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
log = get_plugin_logger("site_hooks")

EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?:span|div)>', re.DOTALL
)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
SHOWN = {".png", ".svg", ".html"}
"""Suffixes of files that the site can show. Such files are copied into the site, others are named by path."""


def on_page_markdown(markdown, page, config, files):
    """Replace each link that leaves `docs/` by one to a copy in the site, or by the path in the checkout."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))
    up = "../" * page.file.dest_uri.count("/")

    def replaced(match):
        path = posixpath.normpath(posixpath.join(folder, match["target"]))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            log.warning(f"{page.file.src_uri}: {match['target']} is not in the repository")
            return match[0]
        if Path(path).suffix not in SHOWN:
            return f"`{path}`" if match["text"].strip("`") in path else f"{match['text']} (`{path}`)"
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if match["image"]:
            return f"![{match['text']}]({up}{path})"
        return f'<a href="{up}{path}">{html.escape(match["text"])}</a>'

    parts = CODE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def on_page_content(content, **_):
    """Convert the TeX that pymdownx.arithmatex has marked to MathML."""

    def replaced(match):
        tex = html.unescape(match["tex"])
        if match["open"] == "(":
            return convert(tex)
        return f'<div class="equation">{convert(tex, display="block")}</div>'

    return EQUATION.sub(replaced, content)
