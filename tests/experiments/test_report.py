"""The HTML report of a run's folder."""

import re
import shutil
from pathlib import Path

import pytest

import qt_jax as qt
from experiments.report import main, write_report

RUN = Path(__file__).parents[2] / "experiments" / "results" / "cifar10-resnet8"


def test_the_report_of_the_committed_run(tmp_path):
    page = write_report(RUN, tmp_path / "report.html").read_text()
    for heading in ("Results", "Training", "Weight tails", "Activation ranges", "Vendors", "Calibration"):
        assert f">{heading}</h2>" in page
    assert "80.29" in page  # the worst INT4 row of Quant-Trim
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), "nothing is fetched"
    assert "stage1_block1/conv1" in page
    assert "\\_" not in page


def test_what_a_run_lacks_is_left_out(tmp_path):
    for name in ("config.json", "metrics.jsonl", "records.jsonl"):
        shutil.copy(RUN / name, tmp_path / name)
    page = write_report(tmp_path).read_text()
    assert ">Training</h2>" in page


def test_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(qt.InvalidInput, match=r"config\.json"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
