"""Check that README is short, opens with the two lines, has right numbers, and that links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "results" / "cifar10-fast-quartic-0" / "records.jsonl"
SCHEMES = {
    "FP32": "fp32",
    "INT8 pt": "int8-pt-minmax",
    "INT8 pc": "int8-pc-minmax",
    "INT4 pt": "int4w-pt-minmax",
    "INT4 pc": "int4w-pc-minmax",
}
METHODS = {"Quant-Trim": "quant-trim", "float twin": "float"}
METRICS = {"top-1 %": ("top1", 100, 2), "SQNR dB": ("sqnr_db", 1, 1)}
"""Name in the table -> key of records, factor and digits."""
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_first_block_holds_the_two_lines_that_ci_runs():
    block = re.search(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    set_up, tests = block[1].splitlines()
    assert set_up.startswith("python3 -m venv .venv && ")
    assert set_up.endswith("python -m experiments.cifar --preset smoke --sched quartic")
    assert tests == ".venv/bin/python -m pytest -n2 --dist=loadfile --cov=qt_jax --cov-fail-under=90"


def written(value, factor, digits):
    return "" if value is None else f"{factor * value:.{digits}f}"


def test_the_table_holds_the_numbers_of_the_records():
    section = (ROOT / "README.md").read_text().partition("## What it gives\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    (_, *header), _, *rows = [[cell.strip(" *") for cell in cells] for cells in lines]
    assert header == [*SCHEMES]
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    found = {(record["method"], record["scheme"]): record for record in records}
    expected = {
        f"{title}, {name}": [
            written(found[method, scheme][key], factor, digits) for scheme in SCHEMES.values()
        ]
        for title, method in METHODS.items()
        for name, (key, factor, digits) in METRICS.items()
    }
    assert {name: cells for name, *cells in rows} == expected
    assert len(rows) == len(expected)


def test_no_placeholder_is_left():
    assert not re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", (ROOT / "README.md").read_text())


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "notebooks/README.md", "experiments/results/README.md"]
)
def test_links_lead_somewhere(name):
    page = ROOT / name
    broken = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not broken
