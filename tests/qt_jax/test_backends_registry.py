"""Test what the backends say about themselves, and that their environments need little to load them."""

import subprocess
import sys
from pathlib import Path

from qt_jax.backends import BACKENDS, steps
from qt_jax.backends.protocol import KINDS
from qt_jax.backends.registry import file_of


def test_every_backend_describes_itself():
    for backend in BACKENDS.values():
        assert backend.kind in KINDS and backend.vendor and backend.stands_for
        names = [scheme.name for scheme in backend.schemes]
        assert len(set(names)) == len(names) and len(backend.runtimes) > 0
        for scheme in backend.schemes:
            assert not (scheme.dynamic and scheme.calibration)
            if scheme.source:
                origin, source = scheme.source
                assert source in [other.name for other in BACKENDS[origin].schemes]
        if backend.environment is not None:
            assert backend.environment.licence and backend.environment.megabytes > 0
            assert all("==" in requirement for requirement in backend.environment.requirements)


def test_a_backend_loads_where_only_numpy_is_installed():
    program = """
import importlib.abc
import importlib.util
import sys


class NumpyAlone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "qt_jax"}:
            raise ModuleNotFoundError(name)


import numpy

sys.meta_path.insert(0, NumpyAlone())
worker, *backends = sys.argv[1:]
spec = importlib.util.spec_from_file_location("worker", worker)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for file in backends:
    print(module.load_backend(file).name)
"""
    files = [steps.WORKER, *map(file_of, BACKENDS.values())]
    command = [sys.executable, "-c", program, *map(str, files)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [backend.name for backend in BACKENDS.values()]
