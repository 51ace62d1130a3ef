"""Check that README is short, that it opens with the two lines, and that links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_first_block_holds_the_two_lines_that_ci_runs():
    block = re.search(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    set_up, tests = block[1].splitlines()
    assert set_up.startswith("python3 -m venv .venv && ")
    assert set_up.endswith("python -m experiments.cifar --preset smoke --sched quartic")
    assert tests == ".venv/bin/python -m pytest -n2 --dist=loadfile --cov=qt_jax --cov-fail-under=90"


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "notebooks/README.md", "experiments/results/README.md"]
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken
