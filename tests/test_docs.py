"""Check that the documentation builds without warnings, holds every public name, and quotes the code."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest

import qt_jax as qt

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TARGETS = sorted(
    name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
)
GAP = "…"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed: pip install -r requirements.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def entries(site):
    """Return the names that have an entry in the API pages."""
    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def documented_modules():
    for target in TARGETS:
        try:
            yield importlib.import_module(target)
        except ModuleNotFoundError:
            continue  # a class or a function


def test_every_public_name_has_an_entry(entries):
    missing = []
    for name in qt.__all__:
        value = getattr(qt, name)
        if isinstance(value, types.ModuleType):
            names = {value.__name__}
        else:
            home = getattr(value, "__module__", None) or "qt_jax"
            names = {f"qt_jax.{name}", f"{home}.{getattr(value, '__qualname__', name)}"}
        if not names & entries:
            missing.append(name)
    assert not missing


def test_every_public_function_of_a_documented_module_has_an_entry(entries):
    missing = [
        f"{module.__name__}.{name}"
        for module in documented_modules()
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and f"{module.__name__}.{name}" not in entries
    ]
    assert not missing


@pytest.mark.parametrize("package", ["qt_jax.export", "qt_jax.backends"])
def test_every_public_name_of_a_package_has_an_entry(package, entries):
    module = importlib.import_module(package)
    homes = {name: getattr(getattr(module, name), "__module__", package) for name in module.__all__}
    missing = [name for name, home in homes.items() if not {f"{package}.{name}", f"{home}.{name}"} & entries]
    assert not missing


def test_no_page_needs_the_network(site):
    for page in site.rglob("*.html"):
        if page.is_relative_to(site / "experiments"):
            continue
        remote = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="https?:[^"]*"', page.read_text())
        assert not remote, page


def test_equations_are_drawn_by_the_browser(site):
    page = (site / "concepts.html").read_text()
    assert page.count("<math") >= 20 and "arithmatex" not in page


def messages():
    """Yield the strings of the source, with `…` for each value that is filled in."""
    for path in [*(ROOT / "qt_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_quoted_message_is_in_the_source():
    quoted = re.findall(r"^```text\n(.*?)\n```$", (DOCS / "troubleshooting.md").read_text(), re.DOTALL | re.M)
    assert len(quoted) >= 25
    source = list(messages())
    assert not [text for text in quoted if not any(holds(candidate, text.split(GAP)) for candidate in source)]


def holds(text, parts):
    """Tell whether `text` has all `parts`, in their order."""
    start = 0
    for part in parts:
        found = text.find(part, start)
        if found < 0:
            return False
        start = found + len(part)
    return True


def test_every_command_has_its_line():
    page = (DOCS / "commands.md").read_text()
    named = set(re.findall(r"`python -m ([\w.]+)", page))
    sources = [*(ROOT / "qt_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in sources
        if '\nif __name__ == "__main__":' in path.read_text()
    } - {"qt_jax.backends.worker"}
    assert named == runnable
