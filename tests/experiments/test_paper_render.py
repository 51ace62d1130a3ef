"""Check rendering: committed results are those of their records, and made-up ones come back byte for byte."""

import functools
import importlib.util
import json
import random
from pathlib import Path

import pytest

import qt_jax as qt
from experiments.paper import figures, render
from experiments.paper.evidence import read
from experiments.paper.rows import DEPLOYMENT, RESULTS, STRUCTURE

SPEC = importlib.util.spec_from_file_location("study_records", Path(__file__).with_name("study_records.py"))
study_records = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study_records)

TASK = study_records.TASK
made_up, written_to = study_records.made_up, study_records.written_to

STUDIES = sorted(path.parent for path in RESULTS.glob(f"paper-*/{DEPLOYMENT}"))
KINDS = ("drops", "reliability", "tails", "ranges", "layers", "curriculum")


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_committed_results_are_those_of_the_records(folder):
    """Run `python -m experiments.paper --preset NAME --render` if this fails."""
    evidence = read(folder)
    pictures = figures.figures(evidence)
    for name, text in render.pages(evidence, folder.name, list(pictures)).items():
        assert (folder / name).read_text() == text, f"{folder.name}/{name} is not that of the records"
    noted = json.loads((folder / render.DIGESTS).read_text())
    assert {name: entry["data"] for name, entry in noted.items()} == {
        name: picture.data_digest for name, picture in pictures.items()
    }
    assert {name: entry["program"] for name, entry in noted.items()} == {
        name: picture.program_digest for name, picture in pictures.items()
    }
    assert {name: entry["file"] for name, entry in noted.items()} == {
        name: render.digest(folder / name) for name in pictures
    }
    assert {path.name for path in folder.glob("*.png")} == pictures.keys()
    text = render.STUDY_PAGE.read_text()
    assert render.filled(text, render.blocks(evidence, folder.name)) == text, (
        f"{render.STUDY_PAGE} differs from the records"
    )


def test_blocks_of_the_page_belong_to_a_study_that_is_there():
    named = {
        line.split()[1]
        for line in render.STUDY_PAGE.read_text().splitlines()
        if line.startswith("<!-- paper-")
    }
    assert named and named <= {folder.name for folder in STUDIES}


def everything(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rendering_is_reproducible_whatever_the_order_of_records(tmp_path):
    """Check that tables and figures that were deleted come back byte for byte."""
    first = written_to(tmp_path / "one" / "paper-cpu", made_up())
    render.render(first)
    before = everything(first)
    assert {name for name in before if name.endswith(".png")} == {f"{kind}-{TASK}.png" for kind in KINDS}
    for path in first.iterdir():
        if path.suffix != ".jsonl":
            path.unlink()
    render.render(first)
    assert everything(first) == before

    shuffled = {name: random.Random(0).sample(rows, len(rows)) for name, rows in made_up().items()}
    second = written_to(tmp_path / "two" / "paper-cpu", shuffled)
    render.render(second)
    assert {n: c for n, c in everything(second).items() if not n.endswith(".jsonl")} == {
        n: c for n, c in before.items() if not n.endswith(".jsonl")
    }


def test_figures_are_drawn_only_when_their_data_change(tmp_path, monkeypatch):
    folder = written_to(tmp_path / "paper-cpu", made_up((0,)))
    render.render(folder)
    drawn = []
    for kind in KINDS:
        draw = getattr(figures, f"draw_{kind}")

        @functools.wraps(draw)
        def noting(data, path, draw=draw):
            drawn.append(path.name)
            draw(data, path)

        monkeypatch.setattr(figures, f"draw_{kind}", noting)
    render.render(folder)
    assert drawn == []
    files = made_up((0,))
    for record in files[STRUCTURE]:
        record["tau"] = []
    (folder / f"ranges-{TASK}.png").write_bytes(b"damaged")
    render.render(written_to(folder, files))
    assert sorted(drawn) == [f"curriculum-{TASK}.png", f"ranges-{TASK}.png"]


def test_figures_of_what_is_gone_are_removed(tmp_path):
    folder = written_to(tmp_path / "paper-cpu", made_up((0,)))
    render.render(folder)
    render.render(written_to(folder, {STRUCTURE: []}))
    assert sorted(path.name for path in folder.glob("*.png")) == [
        f"drops-{TASK}.png",
        f"reliability-{TASK}.png",
    ]
    assert f"tails-{TASK}" not in (folder / "summary.md").read_text()


def test_the_page_gets_its_blocks_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "draw", lambda pictures, folder: None)
    folder = written_to(tmp_path / "paper-cpu", made_up())
    page = tmp_path / "study.md"
    text = "before\n<!-- paper-cpu cost -->\nold\n<!-- end -->\n"
    text += "<!-- paper-accelerator cost -->\nx\n<!-- end -->\n"
    page.write_text(text + f"<!-- paper-cpu {TASK} schedule gains -->\n<!-- end -->\nafter\n")
    render.render(folder, page)
    once = page.read_text()
    assert "12 rows" in once and "linear ramp" in once and "old" not in once
    assert "<!-- paper-accelerator cost -->\nx\n<!-- end -->" in once
    assert once.startswith("before\n") and once.endswith("after\n")
    render.render(folder, page)
    assert page.read_text() == once


def test_what_cannot_be_rendered_is_refused(tmp_path):
    with pytest.raises(qt.InvalidInput, match="holds no records of finished rows"):
        render.render(tmp_path)
    page = tmp_path / "study.md"
    page.write_text("<!-- paper-cpu nothing -->\n<!-- end -->\n")
    with pytest.raises(qt.InvalidInput, match="a table 'paper-cpu nothing' that the records do not give"):
        render.render(written_to(tmp_path / "paper-cpu", made_up((0,))), page)
    assert page.read_text() == "<!-- paper-cpu nothing -->\n<!-- end -->\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_of_a_figure_is_all_that_draws_it_and_nothing_that_gathers_its_data(kind):
    source = figures.drawing_source(f"draw_{kind}")
    for used in (f"def draw_{kind}", "def _plain", "def _finish"):
        assert used in source
    assert "def _colour" in source and "KNOWN_COLOURS =" in source and "FURTHER_COLOURS =" in source
    assert not [other for other in KINDS if f"def {other}(" in source]
    assert [other for other in KINDS if f"def draw_{other}(" in source] == [kind]


def test_the_program_of_a_figure_holds_constants_however_they_are_assigned(tmp_path, monkeypatch):
    program = tmp_path / "figures.py"
    program.write_text(
        "PLAIN = 1\nTYPED: int = 2\nLEFT, (INNER, *REST) = 3, (4, 5)\nUNUSED: int = 6\n"
        "def _height():\n    return TYPED + INNER\n"
        "def draw():\n    return PLAIN + _height() + len(REST)\n"
    )
    monkeypatch.setattr(figures, "__file__", str(program))
    source = figures.drawing_source.__wrapped__("draw")
    for used in ("PLAIN = 1", "TYPED: int = 2", "LEFT, (INNER, *REST) = ", "def _height", "def draw"):
        assert source.count(used) == 1
    assert "UNUSED" not in source
