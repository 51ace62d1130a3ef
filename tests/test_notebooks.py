"""Check that each notebook runs from top to bottom in a new kernel, and is committed as it ran."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.data import load
from qt_jax.errors import InvalidInput

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 180
MOST_BYTES = 300_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(tmp|work|home|root|usr|opt|Users|var)/")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def question(path):
    """Return the title of a notebook."""
    return "".join(cells(path, "markdown")[0]["source"]).splitlines()[0]


def clean_environment():
    """Return the environment of a user, without the variables that the tests set for themselves."""
    ours = ("XLA_FLAGS", "JAX_PLATFORMS", "PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.mark.skipif(importlib.util.find_spec("nbmake") is None, reason="nbmake is not installed")
@each_notebook
def test_a_notebook_runs(path, tmp_path):
    if 'load("cifar10")' in path.read_text().replace("\\", ""):
        try:
            load("cifar10")
        except InvalidInput as error:
            pytest.skip(f"CIFAR-10 is not here and cannot be fetched: {error}")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "--nbmake", f"--nbmake-timeout={SECONDS}", str(path)],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]


@each_notebook
def test_a_notebook_is_committed_as_it_ran(path):
    assert path.stat().st_size < MOST_BYTES
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        source = "".join(cell["source"])
        outputs = cell["outputs"]
        assert not MACHINE_PATH.search(source + json.dumps([o for o in outputs if "text" in o])), source
        assert all(output["output_type"] != "error" for output in outputs), source
        assert all(output.get("name") != "stderr" for output in outputs), source
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert pictures == source.count("plt.show()"), source


@each_notebook
def test_a_notebook_opens_on_a_question(path):
    assert question(path).startswith("# ") and question(path).endswith("?")
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    listed = f"[{path.stem}]({path.name}) | {question(path).removeprefix('# ')} |"
    assert listed in (FOLDER / "README.md").read_text()


def test_notebooks_lead_to_files_that_are_there():
    for path in NOTEBOOKS:
        text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (FOLDER / target).exists(), f"{path.name}: {target}"
