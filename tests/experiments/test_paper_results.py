"""What is committed of the study is what its records give: tables, figures' data, blocks of its page."""

import functools
import importlib
import json

import pytest

from experiments.configs import methods
from experiments.configs.methods import METHODS
from experiments.paper.__main__ import PAGE
from experiments.paper.evidence import read
from experiments.paper.figures import figures
from experiments.paper.render import DIGESTS, blocks, digest, expectation, filled, pages
from experiments.paper.rows import DEPLOYMENT, RESULTS

STUDIES = sorted(path.parent for path in RESULTS.glob(f"paper-*/{DEPLOYMENT}"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_committed_results_are_those_of_the_records(folder):
    """If this fails: python -m experiments.paper --preset NAME --render"""
    evidence = read(folder)
    pictures = figures(evidence)
    for name, text in pages(evidence, folder.name, list(pictures)).items():
        assert (folder / name).read_text() == text, f"{folder.name}/{name} is not that of the records"
    noted = json.loads((folder / DIGESTS).read_text())
    assert {name: entry["data"] for name, entry in noted.items()} == {
        name: picture.digest for name, picture in pictures.items()
    }
    assert {name: entry["file"] for name, entry in noted.items()} == {
        name: digest(folder / name) for name in pictures
    }
    assert {path.name for path in folder.glob("*.png")} == pictures.keys()
    text = PAGE.read_text()
    assert filled(text, blocks(evidence, folder.name)) == text, f"{PAGE} differs from the records"


def test_blocks_of_the_page_belong_to_a_study_that_is_there():
    named = {line.split()[1] for line in PAGE.read_text().splitlines() if line.startswith("<!-- paper-")}
    assert named and named <= {folder.name for folder in STUDIES}


@functools.cache
def cpu():
    return read(RESULTS / "paper-cpu")


@pytest.mark.parametrize("method", METHODS)
def test_the_file_of_a_method_says_what_its_records_give(method):
    module = importlib.import_module(f"{methods.__name__}.{method.replace('-', '_')}")
    assert expectation(cpu(), method) in " ".join(module.__doc__.split())
