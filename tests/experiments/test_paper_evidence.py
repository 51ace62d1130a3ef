"""Check evidence arranged from made-up records, and intervals against SciPy's own and a printed t table."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import qt_jax as qt
from experiments.paper import tables
from experiments.paper.evidence import (
    REFERENCE,
    Estimate,
    common_deployments,
    interval,
    mean_over,
    paired,
    read,
    worst_over,
    written,
)
from experiments.paper.rows import DEPLOYMENT, TRAINING

SPEC = importlib.util.spec_from_file_location("study_records", Path(__file__).with_name("study_records.py"))
study_records = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study_records)

TASK, PT, PC = study_records.TASK, study_records.PT, study_records.PC
evidence, made_up, written_to = study_records.evidence, study_records.made_up, study_records.written_to
VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@given(VALUES)
def test_interval_is_that_of_scipy(values):
    mean, half, n = interval(values)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95) if np.ptp(values) > 1e-6 else None
    assert n == len(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    if theirs is not None:
        assert (mean - half, mean + half) == pytest.approx(tuple(theirs), abs=1e-6)


def test_three_seeds_by_hand():
    """Compare with t_{2, 0.975} = 4.303 of any printed table. The standard deviation of 1, 2, 3 is 1."""
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)


def test_few_values():
    assert interval([]) is None
    assert interval([0.5]) == Estimate(0.5, None, 1)


def test_pairing_takes_the_spread_of_the_seeds_away():
    ahead, behind = {0: 10.0, 1: 50.0, 2: 90.0}, {2: 89.0, 1: 49.0, 0: 9.0, 3: 1.0}
    found = paired(ahead, behind)
    assert found == Estimate(1.0, 0.0, 3) and found.positive
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert not paired({0: 2.0}, {0: 1.0}).positive


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (None, "–"),
        (Estimate(0.5, 0.01, 3), "+50.00 ± 1.00"),
        (Estimate(-0.000001, None, 1), "0.00"),
        (Estimate(-0.5, 0.0, 2), "−50.00 ± 0.00"),
    ],
)
def test_written(estimate, text):
    assert written(estimate, 100, signed=True) == text


def test_accuracy_on_few_images_is_fp32_less_the_drop_there():
    found = evidence().accuracy(TASK, "float", PC)
    assert found == pytest.approx({0: 0.75, 1: 0.76, 2: 0.77})
    assert evidence().accuracy(TASK, "float", PT) == pytest.approx({0: 0.70, 1: 0.71, 2: 0.72})


def test_rows_that_are_not_finished_or_of_several_configs_do_not_count(tmp_path):
    files = made_up()
    files[TRAINING] = [r for r in files[TRAINING] if (r["method"], r["seed"]) != ("float", 2)]
    written_to(tmp_path, files)
    assert set(read(tmp_path).seeds(TASK, "float", REFERENCE)) == {0, 1}
    files[TRAINING][0]["config"] = {"seed": 0, "epochs": 99}
    written_to(tmp_path, files)
    with pytest.raises(qt.InvalidInput, match="trained with different configs"):
        read(tmp_path)


def test_groups_hold_deployments_that_all_methods_have():
    files = made_up()
    broken = [
        r for r in files[DEPLOYMENT] if (r["method"], r["scheme"], r["seed"]) == ("float", PC.scheme, 1)
    ]
    broken[0] |= {"status": "crashed", "top1": None, "reference_top1": None}
    found = evidence(files)
    names = ["float", "quant-trim"]
    assert common_deployments(found, TASK, names, "INT4 pc") == []
    assert common_deployments(found, TASK, ["quant-trim"], "INT4 pc") == [PC]
    assert common_deployments(found, TASK, names, "INT4 pt") == [PT]
    assert "INT4 pc" not in tables.summary(found, TASK)
    assert "crashed" not in tables.by_deployment(found, TASK, "ece", 100, 2)


def test_mean_and_worst_over_deployments():
    found = evidence()
    assert mean_over(found, TASK, "float", [PT, PC], "accuracy") == pytest.approx(
        {0: 0.725, 1: 0.735, 2: 0.745}
    )
    assert worst_over(found, TASK, "float", [PT, PC]) == pytest.approx({0: 0.70, 1: 0.71, 2: 0.72})
    assert mean_over(found, TASK, "float", [], "accuracy") == {}


def test_segmentation_is_judged_by_its_overlap():
    files = made_up()
    for record in files[DEPLOYMENT]:
        record |= {"miou": record["top1"] - 0.3, "reference_miou": record["reference_top1"] - 0.3}
    assert evidence(files).accuracy(TASK, "float", PC)[0] == pytest.approx(0.45)
