"""The program of a backend: what, beside its input, decides what it compiles."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code(file: Path) -> tuple[str, ...]:
    """The module in `file` and those of qt_jax that it imports, directly or not, as syntax trees.

    Without comments, docstrings and the types of functions, which change no number.

    >>> any("Refused" in module for module in code(PACKAGE / "backends" / "litert_graph.py"))
    True
    """
    found: dict[Path, str] = {}
    ahead = [file.resolve()]
    while ahead:
        path = ahead.pop()
        if path not in found:
            tree = _bare(ast.parse(path.read_text()))
            found[path] = ast.dump(tree)
            ahead += [other for node in ast.walk(tree) for other in _imported(node)]
    return tuple(found[path] for path in sorted(found))


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [part for part in body if not _is_text(part)] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _imported(node: ast.AST) -> list[Path]:
    """The files of qt_jax that `from ... import ...` reads; of a package none but the modules it names."""
    first, *parts = (getattr(node, "module", None) or "").split(".")
    if not isinstance(node, ast.ImportFrom) or first != PACKAGE.name:
        return []
    place = PACKAGE.joinpath(*parts)
    candidates = [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
    return [path for path in candidates if path.is_file()]
