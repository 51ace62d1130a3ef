"""Test what is said about environments that are not installed, and the variables of their workers."""

import json
import os

from qt_jax.backends import environments
from qt_jax.backends.protocol import Environment


def test_a_missing_environment_names_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("QT_JAX_ENVIRONMENTS", str(tmp_path))
    asked = Environment("toy", "3.11", ("six==1.17.0",), 1, "MIT", variables={"ROOT": "{site}/x"})
    assert "is not installed: python -m qt_jax.backends install toy" in environments.missing(asked)
    (tmp_path / "toy").mkdir()
    assert "half installed" in environments.missing(asked)
    (tmp_path / "toy" / "installed.json").write_text(json.dumps({"requirements": ["six==1"], "versions": {}}))
    assert "other pins" in environments.missing(asked)
    variables = environments.variables(asked)
    assert variables["ROOT"] == f"{tmp_path}/toy/lib/python3.11/site-packages/x"
    assert variables["PATH"].startswith(f"{tmp_path}/toy/bin{os.pathsep}")
