"""Check the deployment report on hand-made records: numbers, figures, the page, and what is refused."""

import base64
import importlib.util
import io
import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from qt_jax.errors import InvalidInput
from qt_jax.records import new_record
from qt_jax.reporting.answer import answer
from qt_jax.reporting.costs import operator_table
from qt_jax.reporting.page import to_html
from qt_jax.reporting.pivot import REFERENCE, Column, Row, arrange, comparable, drops, group
from qt_jax.reporting.report import contests, head_to_head, headline, write_report
from qt_jax.reporting.statistics import (
    agreement,
    agreement_matrix,
    disagreeing_pairs,
    representative,
    standard_error,
)
from qt_jax.reporting.tables import deployment_table, escaped

SPEC = importlib.util.spec_from_file_location("report_cases", Path(__file__).with_name("report_cases.py"))
report_cases = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report_cases)

BINARY, CASES, CLASSIFIER = report_cases.BINARY, report_cases.CASES, report_cases.CLASSIFIER
DETECTOR, GRID, REGRESSION = report_cases.DETECTOR, report_cases.GRID, report_cases.REGRESSION

QUANT_TRIM, TWIN = Column("t", "m", "quant-trim"), Column("t", "m", "float")
LABELS = np.random.default_rng(0).integers(0, 10, 1000)


def row(method, scheme, top1, backend="onnxruntime", runtime="reference", **extra):
    bits = 4 if scheme.startswith("int4") else 32 if scheme == "fp32" else 8
    values = {
        **{"backend": backend, "scheme": scheme, "runtime": runtime, "method": method, "top1": top1},
        **{"model": "m", "task": "t", "seed": 0, "status": "ok", "n": 1000, "reference_top1": 0.9},
        **{"weight_bits": bits, "activation_bits": 8 if bits == 4 else bits, "data": "hash"},
    }
    return new_record(**values | extra)


def encoded(decisions):
    return base64.b64encode(zlib.compress(np.asarray(decisions, "<u2").tobytes())).decode()


def deciding(method, scheme, wrong, **extra):
    """Make a row that decides as the labels say, except for the images in `wrong`."""
    n = extra.get("n", 1000)
    decisions = LABELS[:n].copy()
    decisions[wrong] = (decisions[wrong] + 1) % 10
    top1 = float(np.mean(decisions == LABELS[:n]))
    return row(method, scheme, top1, predictions=encoded(decisions), **extra)


def refused(method="float", **extra):
    values = {"status": "refused", "reason": "no <kernel> for `Foo_1` | see *log*", "n": None}
    return row(method, "int8-kld", None, backend="npu", runtime="simulator", **values | extra)


RECORDS = [
    deciding("quant-trim", "fp32", slice(0, 100), reliability=[[0, None, None], [1000, 0.8, 0.9]]),
    deciding("quant-trim", "int8-pc", slice(0, 110), reliability=[[500, 0.3, 0.3], [500, 0.8, 0.8]]),
    deciding("quant-trim", "int8-pt", slice(10, 120), reliability=[[500, 0.3, 0.5], [500, 0.8, 0.8]]),
    deciding("quant-trim", "int4w-pc", slice(0, 150)),
    deciding("quant-trim", "int8-kld", slice(0, 60), backend="npu", runtime="simulator", n=500),
    deciding("float", "fp32", slice(0, 90), reference_top1=0.91),
    deciding("float", "int8-pc", slice(0, 112), reference_top1=0.91, latency_ms_p50=2.0),
    deciding("float", "int4w-pc", slice(0, 400), reference_top1=0.91, latency_ms_p50=1.0),
    refused(),
]


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures behind the files, by file name."""
    kept = {}
    save = Figure.savefig

    def keep(self, path, **options):
        kept[re.sub(r"\.[0-9a-f]+\.partial$", "", path.name)] = self
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_rows_and_columns_are_sorted():
    found = arrange(RECORDS[::-1])
    assert [str(r) for r in found.rows] == [
        *("onnxruntime fp32 reference", "onnxruntime int8-pc reference", "onnxruntime int8-pt reference"),
        *("onnxruntime int4w-pc reference", "npu int8-kld simulator"),
    ]
    assert found.columns == [QUANT_TRIM, TWIN]
    assert found.rows[0] == REFERENCE


def test_columns_are_named_by_what_distinguishes_them():
    several = [
        row("float", "fp32", 0.5),
        row("float", "fp32", 0.5, model="n"),
        row("x", "fp32", 0.5, model="x"),
    ]
    found = arrange(several)
    assert [found.name(column) for column in found.columns] == ["m float twin", "n float twin", "x"]
    alone = arrange(several[:1])
    assert alone.name(alone.columns[0]) == "float twin"


def test_a_drop_is_against_the_float_model_on_the_same_images_and_spread_is_of_drops():
    found = arrange(
        [
            row("float", "fp32", 0.91),
            row("float", "int8-a", 0.89),
            row("float", "int8-b", 0.95, n=500, reference_top1=0.97),
            row("float", "int4w", 0.5),
            row("float", "int8-16", 0.1, activation_bits=16),
            row("float", "int8-c", None, status="crashed"),
        ]
    )
    column = found.columns[0]
    int8 = group(found, column, "INT8")
    assert (int8.size, int8.worst.scheme) == (2, "int8-b")
    assert (int8.drop, int8.spread) == (pytest.approx(0.02), pytest.approx(0.01))
    assert group(found, column, "INT4").drop == pytest.approx(0.4)
    assert drops({0: row("float", "int8", 0.5, reference_top1=None)}) == []


def test_gain_needs_the_same_seed_data_and_number_of_images():
    ours, theirs = row("quant-trim", "int8", 0.8), row("float", "int8", 0.7)
    assert comparable({0: ours}, {0: theirs}) == [(ours, theirs)]
    for other in ({"n": 500}, {"data": "other"}, {"top1": None}):
        assert comparable({0: ours}, {0: theirs | other}) == []
    assert comparable({0: ours}, {1: theirs}) == []


def test_agreement_is_taken_on_the_images_both_saw():
    long, short = deciding("float", "a", slice(0, 100)), deciding("float", "b", slice(0, 50), n=500)
    assert agreement(long, short) == 0.9
    assert agreement(long, short | {"data": "other"}) is None
    assert agreement(long, short | {"predictions": None}) is None
    assert agreement(long | {"data": None}, short | {"data": None}) is None


@pytest.mark.parametrize("text", ["###", encoded([1, 2]), base64.b64encode(b"no zlib").decode()])
def test_decisions_that_cannot_be_read_are_named(text):
    record = row("float", "int8-pc", 0.5, predictions=text)
    with pytest.raises(InvalidInput, match=r"onnxruntime, int8-pc, reference, float"):
        agreement(record, record)


def test_matrix_and_pairs_of_equal_accuracy():
    found = arrange(RECORDS)
    rows, matrix = agreement_matrix(found, QUANT_TRIM)
    assert len(rows) == 5
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix[0, 1] == 0.99
    assert matrix[1, 2] == 0.98  # ten images at either end of the block
    pairs = disagreeing_pairs(found, QUANT_TRIM)
    assert [(p.first.scheme, p.second.scheme) for p in pairs] == [("int8-pc", "int8-pt")]
    assert (pairs[0].fraction_differing, pairs[0].top1_distance) == (pytest.approx(0.02), 0.0)


def test_standard_error_bounds_the_paired_one():
    """Compare the bound with the discordant pairs themselves, which need the labels."""
    rng = np.random.default_rng(1)
    one, two = (np.where(rng.random(1000) < p, LABELS, rng.integers(0, 10, 1000)) for p in (0.8, 0.7))
    difference = (one == LABELS).astype(float) - (two == LABELS)
    bound = standard_error(np.mean(one == two), difference.mean(), 1000)
    assert difference.std() / np.sqrt(1000) <= bound < 0.03


def test_the_winner_is_named_with_the_noise():
    found = arrange(RECORDS)
    int8, int4 = contests(found, "INT8"), contests(found, "INT4")
    assert [(c.row.scheme, c.winner, c.certain) for c in int8] == [("int8-pc", "Quant-Trim", False)]
    assert [(c.winner, c.certain) for c in int4] == [("Quant-Trim", True)]
    text = head_to_head(found)
    assert "INT4: of 1 rows Quant-Trim wins 1 and the float twin 0." in text
    assert (
        "| m | onnxruntime int4w-pc reference | 1000 | 85.00 | 60.00 | +25.00 | 2.74 | Quant-Trim |" in text
    )
    swapped = {"float": "quant-trim", "quant-trim": "float"}
    twin = head_to_head(arrange([record | {"method": swapped[record["method"]]} for record in RECORDS]))
    assert "| −25.00 | 2.74 | float twin |" in twin
    assert head_to_head(arrange(RECORDS[:5])) is None


def test_headline():
    text = headline(arrange(RECORDS))
    assert "| Quant-Trim | 90.00 (n 1000) | npu int8-kld simulator | 2.00 (n 500" in text
    assert "| float twin | 3 | 0 | 1 | 0 | 0 | 0 |" in text


def test_reliability_picks_fp32_best_and_worst():
    found = {item.reason: item for item in representative(arrange(RECORDS), QUANT_TRIM)}
    assert {why: (item.row.scheme, round(item.ece, 6)) for why, item in found.items()} == {
        "FP32": ("fp32", 0.1),
        "best": ("int8-pc", 0.0),
        "worst": ("int8-pt", 0.1),
    }


def test_operators_share_a_line_where_networks_do_the_same():
    operators = {"Conv": {"integer": 9, "float": 0, "host": 0}, "Soft_max": {"float": 1}}
    both = [row(method, "int8-pc", 0.5, operators=operators) for method in ("quant-trim", "float")]
    lines = operator_table([*both, refused()]).splitlines()
    assert lines[2] == r"| onnxruntime int8-pc | Conv 9 | Soft\_max 1 | – |"
    assert lines[3].startswith(r"| npu int8-kld | refused: no \<kernel\> for \`Foo\_1\` \| see \*log\* |")
    changed = [both[0], both[1] | {"operators": {"Conv": {"integer": 8}}}]
    assert "| onnxruntime int8-pc (float twin) | Conv 8 | – | – |" in operator_table(changed)


@pytest.mark.parametrize(("width", "count"), [(100, 1), (80, 1), (80, 3)])
def test_terminal_table_stays_within_its_width(width, count):
    many = [record | {"model": f"network-{i}"} for i in range(count) for record in RECORDS]
    many.append(refused("quant-trim", status="unavailable", model="network-0"))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(deployment_table(many))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    assert any("refused" in line for line in lines) and any("unavail." in line for line in lines)


def test_terminal_table_shows_means_over_seeds():
    seeds = [row("float", "fp32", top1, seed=seed) for seed, top1 in enumerate((0.7, 0.9))]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(deployment_table(seeds))
    text = console.export_text()
    assert "80.00" in text and "±" not in text


class Page(HTMLParser):
    """Keep the tags in order, the text, and the sources of pictures, and check that end tags match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "hr", "br"):
            self.open.append(tag)
        named = [value for name, value in attributes if name in ("src", "href")]
        self.sources += [value for value in named if not value.startswith("#")]  # those are of this page

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_written_whole_and_needs_nothing_else(tmp_path, drawn):
    written = write_report(RECORDS, tmp_path / "new" / "report")
    names = [path.name for path in written]
    pictures = ["agreement-1.png", "agreement-2.png", "drops.png", "reliability.png", "latency.png"]
    assert names == [*pictures, "summary.md", "report.html"]
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(names)
    for path in written[:5]:
        with Image.open(path) as image:
            assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 10
    page = Page(written[-1].read_text())
    assert page.open == []
    assert len(page.sources) == 5 and all(src.startswith("data:image/png;base64,") for src in page.sources)
    assert "kernel" not in page.tags and "no <kernel> for `Foo_1` | see *log*" in page.text
    summary = written[-2].read_text()
    assert re.findall(r"\]\((.*?)\)", summary) == ["drops.png", *pictures[:2], *pictures[3:]]
    assert "differ on 2.0 % of the images although their top-1 differs by 0.00" in summary
    texts = {text.get_text() for text in drawn["drops.png"].axes[0].texts}
    assert {"0.00", "1.00", "2.00", "5.00", "31.00", "refused"} <= texts
    assert {"99.0", "98.0"} <= {text.get_text() for text in drawn["agreement-1.png"].axes[0].texts}


def test_one_model_alone(tmp_path):
    records = [
        row("resnet50", scheme, 0.7, model="resnet50", seed=None, task=None)
        for scheme in ("fp32", "int8", "int4w")
    ]
    names = [path.name for path in write_report(records, tmp_path)]
    assert names == ["drops.png", "summary.md", "report.html"]
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# Deployment of resnet50\n")
    assert "float twin" not in text and "None" not in text


def test_all_failed(tmp_path):
    records = [refused(method) for method in ("quant-trim", "float")]
    assert [path.name for path in write_report(records, tmp_path)] == [
        "drops.png",
        "summary.md",
        "report.html",
    ]
    text = (tmp_path / "summary.md").read_text()
    assert text.count("no \\<kernel\\>") == 2  # once among the failures, once among the operators


def test_labels_lie_inside_the_picture(tmp_path, drawn):
    long = [deciding("float", f"int8-a-scheme-of-a-very-long-name-{i}", slice(0, i + 1)) for i in range(4)]
    write_report(long, tmp_path)
    for figure in drawn.values():
        frame = figure.bbox
        for axes in figure.axes:
            for label in [*axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts, axes.title]:
                box = label.get_window_extent()
                assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_other_records_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no records"):
        write_report([], tmp_path)
    with pytest.raises(InvalidInput, match="without backend and scheme"):
        write_report([{"status": "ok"}], tmp_path)


def test_page_keeps_markup_in_reasons_as_text(tmp_path):
    said = "<script>alert(1)</script> [x](javascript:y) **b** a_b_c"
    page = Page(to_html(f"- {escaped(said)}", "<t>", tmp_path))
    assert said in page.text
    assert page.tags.count("script") == 1 and "a" not in page.tags and "strong" not in page.tags


def test_rows_print_without_empty_parts():
    assert str(Row("b", "s", "")) == "b s"


def test_a_network_without_a_name_is_still_called_something(tmp_path):
    record = row(None, "fp32", 0.5, model=None, task=None)
    write_report([record], tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# Deployment of network\n") and "| network top-1 |" in text


def sections(records, folder):
    """Write a report; return the text of its summary by heading, without Markdown's escapes."""
    write_report(records, folder)
    text = (folder / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    return dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])


def table(text):
    """Parse the first Markdown table of `text` as {(first cells joined): {column: cell}}."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    header, _, *rows = lines
    return [dict(zip(header, cells, strict=False)) for cells in rows]


def printed(records, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(deployment_table(records))
    return console.export_text()


@pytest.mark.parametrize("records", CASES.values(), ids=CASES)
def test_any_network_has_a_report_that_opens_with_the_answer(records, tmp_path):
    found = sections(records, tmp_path)
    assert next(iter(found)) == "In short"
    assert [line[2:] for line in found["In short"].splitlines() if line.startswith("- ")] == answer(records)
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).open == []
    lines = printed(records).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)


def test_without_labels_every_output_is_judged(tmp_path):
    found = sections(DETECTOR, tmp_path)
    assert "Judged: boxes, scores, classes. Left out: anchors." in found["In short"]
    assert "top-1" not in "".join(found.values()) and "Accuracy drop" not in found
    assert "![SQNR of the outputs by row and network](sqnr.png)" in found["Closeness to float"]
    row = table(found["All rows"])[2]
    assert {
        key: row[f"network {key}"] for key in ("SQNR", "cosine", "worst image", "largest error", "equal")
    } == {
        **{
            "SQNR": "12.0",
            "cosine": "0.9876",
            "worst image": "6.0",
            "largest error": "0.25",
            "equal": "97.50",
        }
    }
    outputs = table(found["Outputs"])
    assert [line["output"] for line in outputs] == ["boxes", "scores", "classes"] * 3
    assert (outputs[1]["SQNR"], outputs[1]["shape"], outputs[1]["worst image"]) == (
        "41.0",
        "100",
        "7: 35.0 dB",
    )
    assert (outputs[2]["SQNR"], outputs[2]["equal"]) == ("–", "97.50")
    assert "| network | onnxruntime int8-pt reference | 12.0 (n 200) | 4.0 (3 rows) |" in found["Headline"]
    assert "from 30 dB on as good as float" in found["Headline"]
    text = printed(DETECTOR)
    assert all(word in text for word in ("cosine", "worst", "12.0", "refused", "Left out"))


def test_one_output_has_no_table_of_outputs(tmp_path):
    assert "Outputs" not in sections(BINARY, tmp_path)


def test_own_units_and_fractions(tmp_path, drawn):
    found = sections(REGRESSION, tmp_path)
    rows = table(found["All rows"])
    assert [(row["network mean error"], row["network worse by"]) for row in rows] == [
        *(("0.03125", "–"), ("0.03150", "0.00025"), ("0.03250", "0.00125"), ("0.06250", "0.03125"))
    ]
    assert drawn["latency.png"].axes[0].get_ylabel() == "SQNR (dB)" and "drops.png" not in drawn
    rows = table(sections(BINARY, tmp_path)["All rows"])
    assert (rows[3]["network AUC"], rows[3]["network drop"]) == ("85.00", "10.00")
    assert drawn["drops.png"].axes[1].get_ylabel() == "points of AUC"


def test_a_binary_head_judged_by_accuracy_shows_its_auc_too(tmp_path):
    records = [record | {"metric": "accuracy", "auc": record["value"] / 2} for record in BINARY]
    row = table(sections(records, tmp_path)["All rows"])[3]
    assert (row["network accuracy"], row["network AUC"], row["network drop"]) == ("85.00", "42.50", "10.00")


def test_less_is_better_turns_the_winner_round():
    records = [record | {"method": "quant-trim"} for record in REGRESSION]
    records += [record | {"method": "float"} for record in REGRESSION[:1]]
    records += [REGRESSION[1] | {"method": "float", "value": 0.0625}]
    (contest,) = contests(arrange(records), "INT8")
    assert (contest.winner, contest.noise) == ("Quant-Trim", None)
    assert contest.lead == pytest.approx(0.0625 - 0.0315)
    assert "INT8: of 1 rows Quant-Trim wins 1 and the float twin 0." in head_to_head(arrange(records))


def test_rows_that_are_not_what_they_are_called(tmp_path):
    found = sections(CLASSIFIER, tmp_path)
    rows = {f"{row['backend']} {row['scheme']}": row for row in table(found["All rows"])}
    assert rows["k230 int8-pc"]["quantized layers"] == "8 of 9"
    assert rows["onnxruntime int8-pc"]["quantized layers"] == "9 of 9"
    gru = rows["openvino int8-gru"]
    assert (gru["quantized layers"], gru["network top-1"], gru["network drop"]) == (
        "0 of 9",
        "all float",
        "–",
    )
    assert rows["k230 int8-pc"]["speaks for"] == "Canaan, vendor simulator"
    assert rows["grids int8-htp"]["speaks for"] == "Qualcomm, emulated convention"
    deployment = arrange(CLASSIFIER)
    (column,) = deployment.columns
    vendors, conventions = (group(deployment, column, "INT8", flag) for flag in (False, True))
    assert (vendors.size, vendors.worst.backend) == (2, "k230")
    assert (conventions.size, conventions.worst.backend) == (1, "grids")
    assert group(deployment, column, "INT4") is None
    text = found["Headline"]
    assert "20.00 (n 200, noise 5.66, 8 of 9 layers quantized)" in text
    assert "worst INT8 convention" in text and "Left in float on request: /head/Gemm." in text
    assert "Wholly float, and therefore in no group: openvino int8-gru cpu." in text
    assert found["Warnings"].count("- ") == 2 and list(found)[1] == "Warnings"
    assert "relative to the folder of the records" in found["Rows without a number"]
    text = printed(CLASSIFIER)
    assert "8 of 9" in text and "all float" in text and "9 of 9" not in text.replace("8 of 9", "")


def test_emulated_conventions_are_not_counted_among_the_winners():
    both = [row(method, "int8-pc", 0.8) for method in ("quant-trim", "float")]
    emulated = [record | GRID for record in both]
    assert len(contests(arrange(both), "INT8")) == 1
    assert contests(arrange(emulated), "INT8") == []


def test_two_writers_of_one_report_do_not_break_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(lambda _: write_report(BINARY, tmp_path), range(6)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written[0])


def test_reports_are_utf8_in_any_locale(tmp_path):
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from report_cases import CLASSIFIER; from qt_jax.reporting.report import write_report\n"
        "write_report(CLASSIFIER, Path(sys.argv[1]))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    subprocess.run(command, env=os.environ | plain, check=True, cwd=Path(__file__).parents[2])
    assert "√" in (tmp_path / "summary.md").read_text(encoding="utf-8")
