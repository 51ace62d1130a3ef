"""Check the report of the committed run: the file, what may be missing, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest

import qt_jax as qt
from experiments.report import main
from experiments.run_summary import FOLDED, RAW, read_run, write_report

RUN = Path(__file__).parents[2] / "experiments" / "results" / "cifar10-resnet8"


@pytest.fixture
def part(tmp_path):
    """Copy the small files of the run."""
    for name in ("config.json", "metrics.jsonl", "records.jsonl"):
        shutil.copy(RUN / name, tmp_path / name)
    return tmp_path


def test_the_report_of_the_committed_run(tmp_path):
    page = write_report(RUN, tmp_path / "report.html").read_text()
    for heading in ("Results", "Training", "Weight tails", "Activation ranges", "Vendors", "Calibration"):
        assert f">{heading}</h2>" in page
    assert "80.29" in page  # the worst INT4 row of Quant-Trim
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), "nothing is fetched"
    assert "stage1_block1/conv1" in page and "\\_" not in page
    assert len(page) < 2_000_000


def test_weights_are_the_checkpoints_or_else_the_graphs(part):
    assert read_run(part).weights == {}
    shutil.copy(RUN / "model.onnx", part / "model.onnx")
    folded = read_run(part)
    assert list(folded.weights) == ["quant-trim"] and folded.weights_source == FOLDED
    assert next(iter(folded.weights["quant-trim"])) == "stem"
    (part / "model.json").write_text((RUN / "model.json").read_text())
    shutil.copytree(RUN / "checkpoints" / "quant-trim", part / "checkpoints" / "quant-trim")
    raw = read_run(part)
    assert raw.weights_source == RAW
    assert {name: value.shape for name, value in raw.weights["quant-trim"].items()} == {
        name: value.shape for name, value in folded.weights["quant-trim"].items()
    }


def test_records_of_further_backends(part, tmp_path):
    others = tmp_path / "others.jsonl"
    row = json.loads((RUN / "records.jsonl").read_text().splitlines()[1])
    others.write_text(json.dumps(row | {"backend": "npu", "runtime": "simulator"}) + "\n")
    assert main([str(part), "--out", str(tmp_path / "page.html"), "--backends", str(others)]) == 0
    assert f"npu {row['scheme']} simulator" in (tmp_path / "page.html").read_text()


def test_what_was_trained_where_the_config_is_older_or_has_no_grid(part):
    config = json.loads((part / "config.json").read_text())
    config.pop("sites")
    (part / "config.json").write_text(json.dumps(config))
    assert read_run(part).facts["grids in training"] == "weights 8 bits, activations 8 bits"
    (part / "config.json").write_text(json.dumps(config | {"sched": "none", "reverse_pruning": None}))
    told = read_run(part).facts
    assert told["grids in training"].startswith("none") and told["reverse pruning"] == "none"


def test_a_diagnosis_is_a_section(part):
    (part / "diagnosis.md").write_text("# Diagnosis\n\nThe stem costs most.\n")
    assert "The stem costs most." in write_report(part).read_text()


def test_a_line_cut_short_is_skipped_and_a_damaged_one_named(part, capsys):
    path = part / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"method": "quant-tr')
    with pytest.warns(UserWarning, match="cut short"):
        write_report(part)
    path.write_text("{damaged\n" + whole)
    assert main([str(part)]) == 2
    assert "line 1 is not a record" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.onnx", "model.ranges.json"])
def test_a_damaged_file_is_named(part, name, capsys):
    (part / name).write_bytes(b"no such thing")
    assert main([str(part)]) == 2
    assert name in capsys.readouterr().err
    assert not (part / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(qt.InvalidInput, match=r"config\.json"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(qt.InvalidInput, match="does not say dataset"):
        write_report(tmp_path)


def test_backends_and_out_that_cannot_be(part):
    with pytest.raises(qt.InvalidInput, match="is not there"):
        write_report(part, backends=[part / "none.jsonl"])
    with pytest.raises(qt.InvalidInput, match="cannot be written"):
        write_report(part, part / "config.json" / "report.html")
