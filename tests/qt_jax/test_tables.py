"""Compare the tables' numbers with hand-computed ones."""

import io

import pytest
from rich.console import Console

from qt_jax.errors import InvalidInput
from qt_jax.records import new_record
from qt_jax.reporting.pivot import compare, spread
from qt_jax.reporting.tables import accuracy_table, to_markdown


def row(method, scheme, top1, seed=0, **extra):
    values = {"backend": "onnxruntime", "status": "ok", "n": 1000, "model": "m", "task": "t"} | extra
    return new_record(method=method, scheme=scheme, top1=top1, seed=seed, **values)


def cells(records):
    """Parse the Markdown table as {scheme: {column: text}}."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in to_markdown(records).splitlines()
        if line.startswith("|")
    ]
    return {cells[0]: dict(zip(header[1:], cells[1:], strict=True)) for cells in rows}


ONE_SEED = [
    row("float", "fp32", 0.80),
    row("float", "int4w-pt-minmax", 0.70, sqnr_db=9.14, agreement=0.75),
    row("quant-trim", "fp32", 0.79),
    row("quant-trim", "int4w-pt-minmax", 0.78, sqnr_db=13.0, agreement=0.95),
]


def test_one_seed():
    table = cells(ONE_SEED)
    assert table["fp32"] == {
        "Quant-Trim top-1": "79.00",
        "Quant-Trim drop": "–",
        "Quant-Trim SQNR": "–",
        "Quant-Trim agreement": "–",
        "float twin top-1": "80.00",
        "float twin drop": "–",
        "float twin SQNR": "–",
        "float twin agreement": "–",
        "gain": "−1.00",
    }
    assert table["int4w-pt-minmax"]["Quant-Trim drop"] == "1.00"
    assert table["int4w-pt-minmax"]["float twin drop"] == "10.00"
    assert table["int4w-pt-minmax"]["float twin SQNR"] == "9.1"
    assert table["int4w-pt-minmax"]["Quant-Trim agreement"] == "95.00"
    assert table["int4w-pt-minmax"]["gain"] == "+8.00"


def test_drop_and_gain_are_paired_by_seed():
    records = [
        *[row("float", "fp32", top1, seed) for seed, top1 in enumerate((0.80, 0.90))],
        *[row("float", "int8-pt-minmax", top1, seed) for seed, top1 in enumerate((0.79, 0.89))],
        *[row("quant-trim", "fp32", top1, seed) for seed, top1 in enumerate((0.81, 0.89, 0.5))],
        *[row("quant-trim", "int8-pt-minmax", top1, seed) for seed, top1 in enumerate((0.81, 0.89, 0.5))],
    ]
    table = cells(records)
    assert table["fp32"]["float twin top-1"] == "85.00 ± 7.07"
    assert table["int8-pt-minmax"]["float twin drop"] == "1.00 ± 0.00"
    assert table["int8-pt-minmax"]["Quant-Trim drop"] == "0.00 ± 0.00"
    assert table["fp32"]["gain"] == "0.00 ± 1.41"  # the twin has no third seed
    assert "seeds: Quant-Trim 3, float twin 2; test images: 1000" in to_markdown(records)


def test_the_later_record_of_a_cell_counts():
    assert cells([*ONE_SEED, row("float", "fp32", 0.60)])["fp32"]["float twin top-1"] == "60.00"


def test_failures_are_shown_with_their_reasons():
    records = [*ONE_SEED, row("float", "int8-dynamic", None, status="crashed", reason="no | kernel\nhere")]
    table = cells(records)
    assert table["int8-dynamic"]["float twin top-1"] == "crashed"
    assert table["int8-dynamic"]["Quant-Trim top-1"] == table["int8-dynamic"]["gain"] == "–"
    note = "- float twin, seed 0, onnxruntime int8-dynamic: crashed: no | kernel here"
    assert note in to_markdown(records).splitlines()


def test_one_method_alone_has_no_gain_and_unknown_methods_follow():
    assert "gain" not in cells(ONE_SEED[:2])["fp32"]
    assert compare([row("ablation", "fp32", 0.5), *ONE_SEED]).methods == ["quant-trim", "float", "ablation"]


def test_several_backends_are_named_in_the_rows():
    records = [*ONE_SEED, row("float", "fp32", 0.79, backend="openvino")]
    table = cells(records)
    assert list(table) == ["onnxruntime fp32", "onnxruntime int4w-pt-minmax", "openvino fp32"]
    assert table["openvino fp32"]["float twin drop"] == "1.00"


def test_rich_table_holds_the_same_numbers():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(accuracy_table(ONE_SEED))
    text = console.export_text()
    assert all(number in text for number in ("79.00", "10.00", "13.0", "+8.00", "gain"))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no fp32 row"),
        (ONE_SEED[1:2], "no fp32 row"),
        ([*ONE_SEED, row("float", "fp32", 0.5, model="other")], "one model"),
        ([*ONE_SEED, row("float", "fp32", 0.5, task="other")], "one task"),
    ],
)
def test_what_cannot_be_one_table(records, message):
    with pytest.raises(InvalidInput, match=message):
        to_markdown(records)


def test_spread_is_the_sample_standard_deviation():
    assert spread([2.0]) == (2.0, None)
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_segmentation_is_judged_by_miou_and_by_pixels():
    records = [
        row("float", "fp32", 0.90, miou=0.60),
        row("float", "int4w-pt-minmax", 0.85, miou=0.50, agreement=0.9),
        row("quant-trim", "fp32", 0.91, miou=0.58),
        row("quant-trim", "int4w-pt-minmax", 0.90, miou=0.57, agreement=0.95),
    ]
    text = to_markdown(records, "miou")
    assert "| scheme | Quant-Trim mIoU | Quant-Trim drop |" in text and "top-1" not in text
    assert "| int4w-pt-minmax | 57.00 | 1.00 | – | 95.00 | 50.00 | 10.00 | – | 90.00 | +7.00 |" in text
    assert "points of mIoU below" in text and "pixels on which the decision" in text
    pixels = cells(records)["int4w-pt-minmax"]
    columns = ("Quant-Trim pixel accuracy", "float twin drop", "gain")
    assert [pixels[name] for name in columns] == ["90.00", "5.00", "+5.00"]
    assert accuracy_table(records, "miou").title == "mIoU by scheme"
    assert accuracy_table(records).title == "pixel accuracy by scheme"
    assert accuracy_table(ONE_SEED).title == "Top-1 by scheme"
