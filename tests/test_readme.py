"""README is short, and what it and its neighbours link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_test_command_is_the_one_that_ci_looks_for():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith("python -m pytest"))
    assert first == "python -m pytest -n2 --dist=loadfile --cov=qt_jax --cov-fail-under=90"


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "notebooks/README.md", "experiments/results/README.md"]
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken
