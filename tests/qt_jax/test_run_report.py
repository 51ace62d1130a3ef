"""Check the page of a run on hand-made data: its sections, what is missing, and markup in names."""

import numpy as np
import pytest

from qt_jax.export.encodings import Encoding, Ranges
from qt_jax.records import new_record
from qt_jax.reporting.figures import to_svg
from qt_jax.reporting.page import to_html
from qt_jax.reporting.run_figures import Series, draw_curves
from qt_jax.reporting.run_report import (
    MOST_PANELS,
    RunContents,
    range_section,
    run_page,
    training_section,
    weight_section,
)

LAYERS = ("stem", "block_1/conv")


def epoch(number, method="quant-trim", **extra):
    row = {"method": method, "epoch": number, "loss": 1 / number, "lambda": number / 2, "learning_rate": 0.1}
    row |= {"validation_fp32": 0.8, "validation_fake_quant": 0.7, "tau": dict.fromkeys(LAYERS[::-1], 0.5)}
    return row | extra


def record(method, scheme, top1, **extra):
    bits = 4 if scheme.startswith("int4") else 32 if scheme == "fp32" else 8
    values = {"backend": "onnxruntime", "runtime": "reference", "scheme": scheme, "method": method}
    values |= {"top1": top1, "reference_top1": 0.9, "n": 100, "seed": 0, "status": "ok", "task": "t"}
    values |= {"model": "m", "weight_bits": bits, "activation_bits": min(bits, 8) if bits < 32 else 32}
    values |= {"ece": 0.1, "brier": 0.2, "nll": 0.3, "checkpoint": method, "command": "python -m x"}
    return new_record(**values | {"reliability": [[50, 0.3, 0.4], [50, 0.8, 0.7]]} | extra)


RECORDS = [
    *(record("quant-trim", *row) for row in (("fp32", 0.9), ("int8-pt", 0.89), ("int4w-pt", 0.8))),
    *(record("float", *row) for row in (("fp32", 0.9), ("int8-pt", 0.88), ("int4w-pt", 0.5))),
]
GRID = Encoding((0.1,), (0,), (-1.0,), (1.0,), 8, True, None, -127, 127, "learned")
RANGES = Ranges("hash", 17, {"input": GRID, "stem/kernel": GRID}, {"stem": GRID}, {"stem": "stem/kernel"})
WEIGHTS = {
    method: {layer: np.float32([-high, 1, 1, high]) for layer in LAYERS}
    for method, high in (("quant-trim", 1), ("float", 3))
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    diagnosis = "# Diagnosis\n\n## Advice\n\n```text\n## no heading\n```\n\n![Plot](gone.png)\n"
    return run_page(
        RunContents(
            "a_run",
            folder,
            {"data set": "<b>digits</b>"},
            [epoch(1), epoch(2), epoch(1, "float", tau={})],
            RECORDS,
            weights=WEIGHTS,
            weights_source="From here.",
            ranges=RANGES,
            diagnosis=diagnosis,
        )
    )


def test_every_section_is_in_the_contents(page):
    names = (
        "Results",
        "Training",
        "Weight tails",
        "Activation ranges",
        "Vendors",
        "Calibration",
        "Diagnosis",
    )
    for name in (*names, "Reproduce"):
        anchor = name.lower().replace(" ", "-")
        assert f'<a href="#{anchor}">{name}</a>' in page
        assert f'<h2 id="{anchor}">{name}</h2>' in page


def test_the_worst_rows_are_shown_with_their_drop(page):
    assert "89.00 (1.00; int8-pt)" in page and "50.00 (40.00; int4w-pt)" in page


def test_markup_in_facts_stays_text(page):
    assert "&lt;b&gt;digits&lt;/b&gt;" in page and "<b>digits" not in page
    assert "<h1>Run a_run</h1>" in page


def test_the_diagnosis_is_one_level_further_down_and_misses_its_picture(page):
    assert "<h3>Advice</h3>" in page and "## no heading" in page and ">Diagnosis</h1>" not in page
    assert "Plot: gone.png is not there" in page


def test_the_command_is_there_to_copy(page):
    assert "<pre><code>python -m x" in page


def test_a_run_without_data_says_so(tmp_path):
    bare = run_page(RunContents("bare", tmp_path, {"seed": "0"}))
    for said in (
        "There are no records yet",
        "metrics.jsonl holds no epoch",
        "neither checkpoints nor ONNX graphs",
        "no model.ranges.json",
        "No record holds a calibration error",
        "No record says which command",
    ):
        assert said in bare
    assert "Diagnosis" not in bare and "<svg" not in bare


def test_records_of_other_backends_enter_the_results_of_their_network_alone(tmp_path):
    own = record("quant-trim", "int8-x", 0.5, backend="npu", runtime="simulator", n=50)
    other = record("quant-trim", "int8-y", 0.1, backend="npu", checkpoint="of another run", model="n")
    page = run_page(RunContents("r", tmp_path, {}, records=RECORDS, others=[own, other]))
    assert "50.00 (40.00; npu int8-x simulator, on 50 images)" in page
    assert "10.00 (80.00" not in page and "int8-y" in page


def test_segmentation_is_judged_by_its_miou(tmp_path):
    records = [record(*row, miou=row[2] / 2) for row in (("float", "fp32", 0.9), ("float", "int8-pt", 0.7))]
    page = run_page(
        RunContents("r", tmp_path, {}, records=records, metric="miou", validation="validation_miou")
    )
    assert "mIoU in %" in page and "35.00 (10.00; int8-pt)" in page


def test_layers_of_tau_follow_the_network_and_gaps_are_left_out():
    rows = [epoch(1, tau={}, loss=None), epoch(2), epoch(2, validation_fp32=0.9)]
    section = training_section(rows, "top1", "validation", LAYERS)
    assert section.text.index("![stem]") < section.text.index("block\\_1/conv")
    assert set(section.drawings) == {
        *("curve-loss.svg", "curve-accuracy.svg", "curve-lambda.svg", "curve-rate.svg"),
        *("tau-0.svg", "tau-1.svg"),
    }


def test_the_tail_is_the_largest_weight_over_the_root_mean_square():
    text = weight_section(WEIGHTS, "").text
    assert "| stem | 4 | 1.00 | 1.34 |" in text


def test_many_layers_have_panels_for_the_heaviest_tails():
    layers = {f"layer{i}": np.float32([1.0, 1.0 + i]) for i in range(MOST_PANELS + 2)}
    section = weight_section({"float": layers}, "")
    assert len(section.drawings) == MOST_PANELS + 1 and "![layer0]" not in section.text
    assert "| layer0 |" in section.text


def test_a_dead_layer_has_no_tail():
    assert "| dead | 3 | 0.00 |" in weight_section({"float": {"dead": np.zeros(3, np.float32)}}, "").text


def test_ranges_are_of_activations():
    text = range_section(RANGES).text
    assert "| input | learned | −1 | 1 | 0.1 | 8 |" in text and "kernel |" not in text


def test_drawings_take_the_inks_of_the_page():
    svg = to_svg(lambda: draw_curves([Series("a", [1, 2], [1, 2], "#0072B2")], "loss"), "one")
    assert "var(--blue)" in svg and "currentColor" in svg and "#0072b2" not in svg and "#333333" not in svg
    assert "<metadata" not in svg and ">loss</text>" in svg


def test_headings_of_one_name_have_anchors_of_their_own(tmp_path):
    page = to_html("## Rows\n\n## Rows\n\n## λ\n\n- point\n", "t", tmp_path)
    assert page.count('id="rows"') == 1 and 'href="#rows-1"' in page and 'id="λ"' in page
    assert "<li>point</li>" in page
