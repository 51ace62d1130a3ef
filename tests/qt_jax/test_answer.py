"""Check the three sentences at the top of a report on hand-made records."""

import importlib.util
from pathlib import Path

import pytest

from qt_jax.reporting.answer import answer, closeness, warnings_of
from qt_jax.reporting.pivot import arrange, lost, metric_of, score
from qt_jax.reporting.statistics import noise_of_drop

SPEC = importlib.util.spec_from_file_location("report_cases", Path(__file__).with_name("report_cases.py"))
report_cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report_cases)

BINARY, CASES, CLASSIFIER = report_cases.BINARY, report_cases.CASES, report_cases.CLASSIFIER
DETECTOR = report_cases.DETECTOR
NPU, REGRESSION, TWINS = report_cases.NPU, report_cases.REGRESSION, report_cases.TWINS
row, unlabelled = report_cases.row, report_cases.unlabelled


def labelled(scheme, top1, reference=0.9, **extra):
    return row(scheme, **{"top1": top1, "reference_top1": reference} | extra)


@pytest.mark.parametrize("records", CASES.values(), ids=CASES)
def test_three_sentences(records):
    sentences = answer(records)
    assert len(sentences) == 3
    assert all(sentence.endswith(".") and ". " not in sentence for sentence in sentences)


def test_typical_is_the_median_and_the_worst_row_is_named():
    rows = [labelled(f"int8-{i}", top1) for i, top1 in enumerate((0.899, 0.898, 0.85))]
    int8, int4, _ = answer([labelled("fp32", 0.9), *rows])
    assert int8 == (
        "At INT8 the network loses 0.20 points of top-1 on a typical toolchain and 5.0 on the worst of 3 "
        "rows (onnxruntime int8-2 reference)."
    )
    assert int4 == "What INT4 costs is not known: no INT4 row was run."


def test_a_loss_within_the_noise_is_said_to_be():
    alike = {"agreement": 0.99, "n": 200}  # at most 2 √((0.01 − 0.005²) / 200) = 0.014
    records = [labelled("fp32", 0.9), labelled("int8-pc", 0.895, **alike)]
    found = arrange(records)
    bound = noise_of_drop(found, found.columns[0], found.rows[1])
    assert bound == pytest.approx(2 * ((0.01 - 0.005**2) / 200) ** 0.5)
    sentences = answer(records)
    assert "loses 0.50 points of top-1 in the only row" in sentences[0]
    assert "within the noise of 200 images" in sentences[0]
    assert sentences[2].startswith("Nothing breaks at INT8, and there is nothing to do")
    more = answer([records[0], labelled("int8-pc", 0.7, **alike)])
    assert "noise" not in more[0] and more[2].startswith("It breaks at INT8")


def test_nothing_lost():
    records = [labelled("fp32", 0.9), labelled("int8-a", 0.91), labelled("int8-b", 0.9)]
    assert answer(records)[0] == "At INT8 the network loses nothing in any of 2 rows."


def test_without_labels_decibels_and_what_they_mean():
    floats = [
        record | {"fidelity": [it for it in record.get("fidelity") or () if it.get("equal") is None]}
        for record in DETECTOR
    ]
    int8, _, advice = answer(floats)
    assert int8 == (
        "At INT8 the outputs keep 31.0 dB on a typical toolchain (errors of 2.8 % of the signal, as good as "
        "float for most tasks) and 12.0 dB on the worst of 3 rows (onnxruntime int8-pt reference; errors of "
        "25 % of the signal, likely broken)."
    )
    # One in forty class numbers is wrong: 10 log10(40) = 16.0 dB.
    assert answer(DETECTOR)[0].startswith("At INT8 the outputs keep 16.0 dB on a typical toolchain")
    assert (
        "with per-tensor scales" in advice and "take per-channel scales, as in onnxruntime int8-pc" in advice
    )
    assert [closeness(value)[:7] for value in (30, 29.9, 19.9, 14.9)] == [
        *("as good", "to be c", "likely ", "likely ")
    ]


def test_one_calibration_breaks():
    advice = answer(BINARY)[2]
    assert advice == (
        "It breaks at INT8 with minmax calibration (the only row of this kind), worst in k230 int8-minmax "
        "simulator, with 10.0 points lost: calibrate by kld, as in k230 int8-kld simulator, with 1.0 points "
        "lost."
    )


def test_one_toolchain_breaks():
    rows = [labelled("int8-a", 0.2, **NPU), labelled("int8-b", 0.2, **NPU), labelled("int8-pc", 0.9)]
    advice = answer([labelled("fp32", 0.9), *rows])[2]
    assert advice.startswith(
        "It breaks at INT8 on k230 (all 2 rows of this kind), worst in k230 int8-b simulator"
    )
    assert "take another toolchain, such as onnxruntime int8-pc reference" in advice
    good = labelled("int8-c", 0.9, **NPU)
    advice = answer([labelled("fp32", 0.9), *rows, good])[2]
    assert "in 2 of 4 rows, all on k230" in advice and "take k230 int8-c simulator there" in advice


def test_four_bits_break_and_eight_do_not():
    records = [labelled("fp32", 0.9), labelled("int8-pc", 0.9), labelled("int4w-pc", 0.3)]
    assert answer(records)[2] == (
        "It breaks at INT4 in the only row, worst in onnxruntime int4w-pc reference, with 60.0 points lost: "
        "stay at 8 bits."
    )
    eight = [labelled("fp32", 0.9), labelled("int8-pc", 0.3)]
    assert "leave the layers in float that the diagnosis names" in answer(eight)[2]


def test_errors_of_which_less_is_better():
    int8, int4, advice = answer(REGRESSION)
    assert "loses 0.00075 in mean error on a typical toolchain and 0.00125 on the worst of 2 rows" in int8
    assert "loses 0.03125 in mean error in the only row" in int4
    assert "It suffers at INT8 with per-tensor scales" in advice and "mean error worse by 0.00125" in advice


def test_two_networks_are_compared():
    int8, _, advice = answer(TWINS)
    assert "Quant-Trim loses less than the float twin in the only row" in int8
    assert (
        "at INT8 for the float twin" in advice
        and "take onnxruntime int8-pc reference of Quant-Trim" in advice
    )


def test_two_networks_are_compared_where_the_first_loses():
    twins = [
        {**r, "method": method, "run": method} for method in ("quant-trim", "float") for r in rows_of(method)
    ]
    int8 = answer(twins)[0]
    assert "less than the float twin in 1 of 3 rows, and more in 2, most so in onnxruntime int8-c" in int8


def rows_of(method):
    """Return three rows of a network that loses 1, 2 and 5 points, or 3, 1 and 1."""
    values = (0.89, 0.88, 0.85) if method == "quant-trim" else (0.87, 0.89, 0.89)
    return [labelled("fp32", 0.9)] + [
        labelled(f"int8-{name}", value) for name, value in zip("abc", values, strict=True)
    ]


def test_emulated_conventions_do_not_speak_for_vendors():
    int8, int4, _ = answer(CLASSIFIER)
    assert "20.0 on the worst of 2 rows (k230 int8-pc simulator, 8 of 9 layers quantized)" in int8
    assert int4.startswith(
        "At INT4 (emulated conventions, no vendor's toolchain) the network loses 50.0 points"
    )


def test_no_row_ended_well():
    failed = [
        labelled("int8-pc", None, status="refused", reason="no"),
        labelled("int8-pt", 0.9, status="invalid", reason="nothing was quantized: all in float"),
    ]
    sentences = answer(failed)
    assert sentences[0] == (
        "What INT8 costs is not known: none of its rows ended well (1 refused, 1 all float)."
    )
    assert sentences[2].startswith("Where it breaks cannot be said")


def test_layers_left_in_float_are_mentioned():
    records = [labelled("fp32", 0.9), labelled("int8-pc", 0.9, float_layers=["/head/Conv", "/head/Mul"])]
    assert answer(records)[0].startswith("At INT8, with 2 nodes left in float, the network loses")


def test_warnings_are_said_once_and_name_their_network():
    assert warnings_of(CLASSIFIER) == [
        "All calibration images are of one class.",
        "The <test> images lie outside 0..1.",
    ]
    other = [unlabelled("int8-pc", 30.0, model="other")]
    assert warnings_of([*CLASSIFIER, *other])[0] == "net: All calibration images are of one class."
    assert warnings_of(DETECTOR) == warnings_of([]) == []


def test_scores_of_old_and_new_records():
    old = {"top1": 0.5, "reference_top1": 0.75, "status": "ok"}
    assert (score(old), lost(old)) == (0.5, 0.25)
    new = {"metric": "auc", "value": 0.75, "reference_value": 0.875, "top1": 0.1, "status": "ok"}
    assert (score(new), lost(new)) == (0.75, 0.125)
    assert score(new | {"status": "invalid"}) is None and score(new | {"metric": None, "top1": None}) is None
    assert metric_of([new]).title == "AUC" and metric_of([old]).title == "top-1"
    assert metric_of([old | {"miou": 0.3}]).title == "pixel accuracy"
    assert metric_of(REGRESSION)[:4] == ("mean_error", "mean error", 1.0, 5)
    assert metric_of(DETECTOR) is None
    assert metric_of([{"metric": "own.module:edge_f1", "value": 1234.5}])[1:] == ("edge f1", 1.0, 0)


def test_integer_outputs_are_equal_or_not():
    fidelity = [report_cases.output("classes", None, equal=0.875)]
    records = [row("int8-pc", judged=["classes"], metric=None, fidelity=fidelity)]
    int8, _, advice = answer(records)
    assert int8 == (
        "At INT8 the integer outputs equal those of the float model in 87.5 % of their elements in the worst "
        "of 1 rows."
    )
    assert advice.startswith("Where it breaks cannot be said")
