"""Test that the key of a compilation follows the code that makes it, wherever in the package that is."""

from pathlib import Path

import pytest

from qt_jax.backends import rows

BACKEND = "from qt_jax.backends.helper import double\nBACKEND = double(1)\n"
HELPER = '"""A text."""\nfrom qt_jax.export import passes\n\ndef double(x):\n    return passes.fold(x)\n'
PASSES = "def fold(x):\n    return 2 * x\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package like this one: a backend, a module beside it, and one of the exporter's."""
    root = tmp_path / "qt_jax"
    for folder in ("backends", "export"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("import jax\n")
    (root / "backends" / "vendor.py").write_text(BACKEND)
    (root / "backends" / "helper.py").write_text(HELPER)
    (root / "export" / "passes.py").write_text(PASSES)
    monkeypatch.setattr(rows, "PACKAGE", root)
    return root


def compiled_by(package: Path) -> tuple[str, ...]:
    rows.code.cache_clear()
    return rows.code(package / "backends" / "vendor.py")


@pytest.mark.parametrize(
    ("name", "text", "same"),
    [
        ("backends/helper.py", HELPER.replace("A text", "Another") + "# and a comment\n", True),
        ("backends/helper.py", HELPER.replace("(x)\n", "(x + 1)\n"), False),
        ("export/passes.py", PASSES.replace("2", "3"), False),
        ("export/__init__.py", "import numpy\n", True),
    ],
)
def test_code_covers_everything_that_is_imported(package, name, text, same):
    before = compiled_by(package)
    assert len(before) == 3
    (package / name).write_text(text)
    assert (compiled_by(package) == before) is same


def test_modules_that_import_each_other(package):
    (package / "export" / "passes.py").write_text("from qt_jax.backends import helper\n" + PASSES)
    assert len(compiled_by(package)) == 3
