"""Check the structure: imports run one way, no command is a library, and no name means two things."""

import ast
import functools
import importlib
import pkgutil
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    # what everything else stands on
    ("qt_jax.errors", "qt_jax.files"),
    ("qt_jax.records", "qt_jax.provenance", "qt_jax.command_line", "qt_jax.processes"),
    ("qt_jax.scheduler", "qt_jax.metrics", "qt_jax.schedules"),
    # the method
    ("qt_jax.grid", "qt_jax.ranges"),
    ("qt_jax.config",),
    ("qt_jax.interception",),
    ("qt_jax.dataflow", "qt_jax.points", "qt_jax.pooling"),
    ("qt_jax.trim", "qt_jax.batch_norm", "qt_jax.fusion", "qt_jax.pruning"),
    ("qt_jax.layer_coverage", "qt_jax.recipes"),
    # from a trained network to tables: export -> backends -> tables
    ("qt_jax.export",),
    ("qt_jax.backends",),
    ("qt_jax.reporting",),
    ("qt_jax.comparison", "qt_jax.diagnosis", "qt_jax.equalization"),
    ("qt_jax",),
    # the experiments: data -> train -> export and deploy -> the study
    ("experiments.devices", "experiments.data", "experiments.models"),
    ("experiments.configs",),
    ("experiments.baselines",),
    ("experiments.training",),
    ("experiments.runs",),
    ("experiments.run_summary", "experiments.masks"),
    ("experiments.pipeline",),
    ("experiments.benchmarks", "experiments.speedrun", "experiments.paper"),
    ("experiments.accelerator",),
    ("experiments",),
)
"""Packages and modules from the ground up; the longest name that fits a module gives its floor."""

FACE = "qt_jax"
"""`import qt_jax as qt` is the public interface. What stands above the method may use it, as users do."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the two packages, by dotted name."""
    found = {}
    for package in ("qt_jax", "experiments"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


@functools.cache
def commands() -> set[str]:
    """Return the modules that `python -m` runs."""
    return {
        name
        for name, tree in modules().items()
        if any(ast.unparse(node).startswith("if __name__ ==") for node in tree.body)
    }


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Return the modules of the project that a module imports, lazily or not, save for type hints."""
    found = set()
    hints = {
        inner
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(modules()[name]):
        if node in hints:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in modules() else node.module)
    return frozenset(found & modules().keys() - {name})


def floor(name: str) -> int:
    """Return the number of the floor that a module stands on."""
    fitting = [
        (len(prefix), number)
        for number, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    return max(fitting)[1]


def test_no_import_runs_upwards():
    upward = [
        f"{name} imports {other}"
        for name in sorted(modules().keys() - commands())
        for other in sorted(imports(name) - {FACE})
        if floor(other) > floor(name) and not (other in ("qt_jax.export", "qt_jax.backends") and name == FACE)
    ]
    assert not upward


def test_the_face_is_used_by_nothing_below_it():
    below = [name for name in modules() if floor(name) < floor("qt_jax.export") and FACE in imports(name)]
    assert not below


def test_there_is_no_cycle():
    order: list[str] = []
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in order:
            return
        path.append(name)
        for other in sorted(imports(name)):
            visit(other)
        order.append(path.pop())

    for name in sorted(modules()):
        visit(name)


def test_no_command_is_imported():
    imported = [f"{name} imports {other}" for name in modules() for other in imports(name) & commands()]
    assert not imported


REFUSING = "qt_jax.equalize"
"""A command that bears the name of a public function, and so refuses to be imported."""


def submodules() -> list[str]:
    """Return every module of `qt_jax` and of the experiments that can be imported here."""
    packages = [name for name, tree in modules().items() if (ROOT / name.replace(".", "/")).is_dir()]
    return [
        f"{package}.{info.name}"
        for package in packages
        for info in pkgutil.iter_modules([str(ROOT / package.replace(".", "/"))])
        if info.name != "__main__" and f"{package}.{info.name}" != REFUSING
    ]


@pytest.mark.parametrize("name", submodules())
def test_no_module_is_shadowed(name):
    """`import a.b as m` gives the module b, although a may import a function from it."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    package, _, attribute = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(package), attribute), types.ModuleType)
    assert getattr(importlib.import_module(package), attribute) is module


def test_a_command_does_not_take_the_place_of_a_function():
    with pytest.raises(ImportError, match="is a function and a command"):
        importlib.import_module(REFUSING)
    assert isinstance(importlib.import_module(FACE).equalize, types.FunctionType)


TWINS = {"BasicBlock", "Bottleneck", "DoubleConv", "EncoderBlock", "InvertedResidual"}
"""Blocks that `experiments.benchmarks.torch_*` write once more in PyTorch, under the same names."""


def test_no_class_has_the_name_of_another():
    homes: dict[str, list[str]] = {}
    for name, tree in modules().items():
        for node in tree.body:
            defined = []
            if isinstance(node, ast.ClassDef):
                defined = [node.name]
            elif isinstance(node, ast.Assign):
                defined = [target.id for target in node.targets if isinstance(target, ast.Name)]
                defined = [it for it in defined if it in ("SCHEMES", "METHODS")]
            for it in defined:
                if not it.startswith("_"):
                    homes.setdefault(it, []).append(name)
    twice = {it: where for it, where in homes.items() if len(where) > 1 and it not in {"Options", *TWINS}}
    assert not twice
