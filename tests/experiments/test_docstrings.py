"""Run every example in the docstrings of the experiments, and compare what it prints."""

import doctest
import importlib
import pkgutil

import pytest

import experiments

MODULES = [info.name for info in pkgutil.walk_packages(experiments.__path__, "experiments.")]
OPTIONAL = {
    f"experiments.benchmarks.torch_{name}": "torch"
    for name in ("classifiers", "models", "public", "segmenters", "sequences", "step")
}
"""Maps a module to the package that it needs, which is not among the pins."""


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(".__main__")])
def test_docstring_examples(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0
