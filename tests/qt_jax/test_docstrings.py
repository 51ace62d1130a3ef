"""Run every example in the package's docstrings, and compare what it prints."""

import doctest
import importlib
import pkgutil

import pytest

import qt_jax

REFUSING = "qt_jax.equalize"
"""A command that bears the name of a public function, and so refuses to be imported."""

MODULES = ["qt_jax", *(info.name for info in pkgutil.walk_packages(qt_jax.__path__, "qt_jax."))]
MODULES.remove(REFUSING)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0
