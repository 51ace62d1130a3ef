"""Extend griffe with two habits of this project's docstrings that its Google style does not know.

An example with `>>>` may stand anywhere in a docstring. One entry under Args may describe several arguments.
"""

import re
import textwrap

import griffe

SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<rest>.*(?:\n(?P=indent) +.*)*)", re.M
)


def fenced(text: str) -> str:
    """Put each run of lines from a `>>>` to the next blank line into a fence with the same indentation."""
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
    """Split an entry under Args such as `low, high: a range` into one entry for `low` and one for `high`.

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
    """Rewrite every docstring that griffe loads."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Rewrite the docstring of one module, class, function or attribute. Griffe calls this for each."""
        if obj.docstring is not None:
            obj.docstring.value = separate(fenced(obj.docstring.value))
