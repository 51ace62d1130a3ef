"""Check tables of made-up records, so that every number can be checked by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from experiments.configs.methods import METHODS
from experiments.paper import tables
from experiments.paper.evidence import interval
from experiments.paper.rows import DEPLOYMENT, STRUCTURE

SPEC = importlib.util.spec_from_file_location("study_records", Path(__file__).with_name("study_records.py"))
study_records = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(study_records)

TASK, PC = study_records.TASK, study_records.PC
evidence, made_up = study_records.evidence, study_records.made_up


def cells(table: str, row: str) -> list[str]:
    [line] = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_summary_by_hand():
    table = tables.summary(evidence(), TASK)
    assert table.splitlines()[0] == ("| method | FP32 | INT4 pt (1) | INT4 pc (1) | worst INT4 | seeds |")
    half = 100 * interval([0.0, 0.01, 0.02]).half
    assert half == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)
    expected = [f"{mean:.2f} ± {half:.2f}" for mean in (81.0, 71.0, 76.0, 71.0)]
    assert cells(table, "float + PTQ") == [*expected, "3"]


def test_gains_are_paired_and_bold_where_they_are_certain():
    table = tables.gains(evidence(), TASK)
    assert cells(table, METHODS["quant-trim"].title) == [
        *("−1.00 ± 0.00", "**+6.00 ± 0.00**", "**+2.50 ± 0.00**", "**+6.00 ± 0.00**")
    ]
    ablation = tables.gains(evidence(), TASK, "schedule", "quant-trim")
    assert cells(ablation, "linear ramp")[1] == "−2.00 ± 0.00"


def test_the_recommended_recipe_over_each_and_losses_against_own_fp32_by_hand():
    row = cells(tables.leads(evidence(), TASK), "float + PTQ")
    assert row[:2] == ["−0.50 ± 0.00", "**+7.50 ± 0.00**"]  # 0.795 and 0.80; losses of 0.02 and 0.10
    assert cells(tables.losses(evidence(), TASK), "float + PTQ")[0] == "+10.00 ± 0.00"


def test_layers_by_hand():
    table = tables.by_layer(evidence(), TASK, "int4w-pt-minmax")
    assert cells(table, "stem") == ["11.0", "11.0", "11.0"]  # of float, published, recommended; not of linear
    assert cells(table, "**mean of layers**") == ["13.0", "13.0", "13.0"]
    assert len(tables.by_layer(evidence(), TASK, "int8-pt-minmax").splitlines()) == 3


def test_layers_are_compared_over_the_seeds_that_all_methods_have():
    files = made_up()
    files[STRUCTURE] = [r for r in files[STRUCTURE] if (r["method"], r["seed"]) != ("recommended", 2)]
    table = tables.by_layer(evidence(files), TASK, "int4w-pt-minmax")
    assert cells(table, "stem") == ["10.5", "10.5", "10.5"]


def test_the_page_of_methods_states_what_records_give():
    table = tables.methods_table(evidence())
    *_, task, minutes, fp32, int8, int8_pc, int4, int4_pc = cells(table, "`float`")
    assert (task, minutes, fp32, int4, int4_pc) == (TASK, "6", "81.0", "71.0", "76.0")
    assert int8 == int8_pc == "–"
    assert cells(table, "`float`")[0] == METHODS["float"].about
    assert "`step`" not in table
    assert tables.methods_table(evidence()) == table


def test_deployments_that_some_method_lacks_are_named():
    files = made_up()
    for record in files[DEPLOYMENT]:
        if (record["method"], record["scheme"]) == ("float", PC.scheme):
            record |= {"status": "crashed", "top1": None, "reference_top1": None}
            break
    named = tables.left_out(evidence(files), TASK)
    assert PC.scheme in named and "(float + PTQ)" in named
    assert tables.left_out(evidence(), TASK) == ""


def test_a_deployment_where_nothing_ran_says_why():
    files = made_up()
    for record in files[DEPLOYMENT]:
        if (record["method"], record["scheme"]) == ("float", PC.scheme):
            record |= {"status": "refused", "top1": None, "reference_top1": None}
    assert "| refused |" in tables.by_deployment(evidence(files), TASK, "accuracy", 100, 2)


def test_quality_edge_training_and_search_tables():
    found = evidence()
    assert cells(tables.quality(found, TASK, "sqnr_db"), "float + PTQ")[1] == "10.0 ± 0.0"
    assert tables.edge(found, TASK).count("\n") == 2  # header, rule, the one place with a clock
    assert "not searched" in tables.training(found) and "sched none" in tables.training(found)
    assert "| 80.00 | 70.00 | – | 50.00 |" in tables.search(found)
    assert "12 rows and 1 trials of the search, 1.2 hours" in tables.cost(found)
    assert "commit 0123456789ab-dirty; on a CPU (cpu); with jax 1" in tables.cost(found)
