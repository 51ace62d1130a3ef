"""A griffe extension: what this project's docstrings do that griffe's Google style does not know.

Examples with `>>>` stand wherever they explain something, and one entry may describe several arguments.
"""

import re
import textwrap

import griffe

SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<rest>.*(?:\n(?P=indent) +.*)*)", re.M
)


def fenced(text: str) -> str:
    """`text` with each run of lines from a `>>>` to the next blank line in a fence of its own indentation."""
    lines: list[str] = []
    indent = None
    for line in [*text.splitlines(), ""]:
        if indent is None and line.lstrip().startswith(">>>"):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line.split("  # doctest:")[0] if indent is not None else line)
    return textwrap.dedent("\n".join(lines)).rstrip()


def separate(text: str) -> str:
    """`text` with `low, high: a range` under Args as an entry for `low` and one for `high`.

    >>> print(separate("Args:\\n  a, b: both"))
    Args:
      a: both
      b: both
    """
    head, found, rest = text.partition("Args:\n")
    arguments, blank, after = rest.partition("\n\n")

    def split(match: re.Match) -> str:
        names = match["names"].split(", ")
        return "\n".join(f"{match['indent']}{name}: {match['rest']}" for name in names)

    return head + found + SHARED.sub(split, arguments) + blank + after


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = separate(fenced(obj.docstring.value))
