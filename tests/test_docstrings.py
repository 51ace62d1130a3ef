"""Check that docstrings begin as the house rule says: with a verb in the imperative."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NO_VERBS = {
    *("A", "An", "The", "What", "How", "Whether", "For", "As", "In", "Each", "One", "Where", "Which"),
    *("It", "This", "These"),
}
"""First words that give away a docstring which does not begin with a verb."""


def begins_with_a_verb(docstring: str) -> bool:
    """Return whether a docstring may begin with a verb, by its first word."""
    return docstring[:1].isupper() and docstring.split()[0] not in NO_VERBS


@pytest.mark.parametrize("package", ["qt_jax", "experiments"])
def test_docstrings_begin_with_a_verb(package):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    seen, failing = 0, []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
            if docstring is not None:
                seen += 1
                if not begins_with_a_verb(docstring):
                    name = getattr(node, "name", "the module")
                    failing.append(f"{path.relative_to(ROOT)}, {name}: {docstring.splitlines()[0]}")
    assert seen > 100 and not failing


@pytest.mark.parametrize(
    ("docstring", "good"),
    [("Return it.", True), ("The scale.", False), ("Whether it is.", False), ("`x` is.", False), ("", False)],
)
def test_the_rule(docstring, good):
    assert begins_with_a_verb(docstring) == good
