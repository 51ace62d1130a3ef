"""Check the command that takes ONNX files of other authors, on files and pictures made here."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from PIL import Image

from experiments import public_onnx
from experiments.public_onnx import main, measure, table
from experiments.public_onnx_sources import PICTURES, SOURCES, Material, Source


def network(quantized: bool = False) -> onnx.ModelProto:
    """Make a classifier of eight numbers that takes the larger half, or one with a quantized input."""
    first = "q = QuantizeLinear(x, s) d = DequantizeLinear(q, s)" if quantized else "d = Relu(x)"
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[b, 8] x) => (float[b, 2] y) <float s = {{0.01}}> {{ {first} y = MatMul(d, w) }}""")
    weights = np.repeat(np.eye(2, dtype=np.float32), 4, axis=0)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    return model


def halves(material: Material, n: int) -> dict[str, np.ndarray]:
    """Draw numbers of which the labelled half is larger by 1."""
    labels = material.rng.permutation(np.arange(n) % 2)
    larger = np.repeat(np.eye(2)[labels], 4, axis=1)
    return {"images": (larger + material.rng.random((n, 8))).astype(np.float32), "labels": labels}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder of installed packages: one with two networks, and the pictures."""
    pictures = tmp_path / PICTURES / "skimage" / "data"
    pictures.mkdir(parents=True)
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(pictures / "coffee.png")
    patches = np.arange(200.0)[:, None, None] / 200 * np.ones((25, 25))
    np.save(pictures / "lfw_subset.npy", patches)
    (tmp_path / "made==1.0").mkdir()
    onnx.save(network(), tmp_path / "made==1.0" / "halves.onnx")
    onnx.save(network(quantized=True), tmp_path / "made==1.0" / "quantized.onnx")
    sources = tuple(
        Source(name, "made==1.0", f"{name}.onnx", "classifier", halves) for name in ("halves", "quantized")
    )
    monkeypatch.setattr(public_onnx, "SOURCES", sources)
    monkeypatch.setattr(public_onnx, "SCHEMES", {"onnxruntime": ("int8-pc-minmax",)})
    return tmp_path


def test_each_command_leaves_a_record(packages: Path, capsys: pytest.CaptureFixture[str]):
    out = packages / "out.jsonl"
    call = ["--packages", str(packages), "--out", str(out), "--limit", "8", "--backends", "onnxruntime"]
    assert main(call) == 0
    rows = {(row["model"], row["toolchain"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == [
        (model, tool) for model in ("halves", "quantized") for tool in ("onnxruntime", "diagnosis")
    ]
    deployed = rows["halves", "onnxruntime"]
    assert (deployed["status"], deployed["exit"], deployed["traceback"]) == ("ok", 0, False)
    assert (deployed["inputs"], deployed["outputs"], deployed["opset"]) == (["x"], ["y"], 17)
    [row] = deployed["rows"]
    assert row["status"] == "ok"
    assert (row["n"], row["metric"], row["value"], row["reference_value"]) == (8, "top1", 1.0, 1.0)
    assert row["sqnr_db"] > 30
    assert deployed["statuses"] == {"ok": 1}
    assert rows["halves", "diagnosis"]["status"] == "ok"
    assert rows["halves", "diagnosis"]["sentence"].startswith("Rounded to int8-pt")
    for tool in ("onnxruntime", "diagnosis"):
        refused = rows["quantized", tool]
        assert (refused["status"], refused["exit"]) == ("refused", 2)
        assert "already quantized" in refused["sentence"]
        assert str(packages) not in refused["sentence"]
    assert "| halves | made==1.0 | classifier | 1 / 1 | 17 | int8-pc-minmax: " in capsys.readouterr().out


def test_a_crash_and_a_command_that_hangs_are_told_apart(packages: Path, monkeypatch: pytest.MonkeyPatch):
    program = "raise ValueError('lost') if {crash} else __import__('time').sleep(60)"
    found = []
    for crash in (True, False):
        calls = ["-c", program.format(crash=crash)]
        monkeypatch.setattr(public_onnx, "_module", lambda name, calls=calls: calls)
        found += measure(packages / "made==1.0" / "halves.onnx", packages, (), 8, timeout=2.0)
    assert [(row["status"], row["traceback"], row["exit"]) for row in found] == [
        ("crashed", True, 1),
        ("timeout", False, None),
    ]
    assert found[0]["sentence"] == "ValueError: lost"


def test_the_table_says_why_a_row_has_no_figures():
    about = {"model": "m", "package": "p==1", "kind": "k", "inputs": ["x"], "outputs": ["y"], "opset": 9}
    row = {"scheme": "int8", "status": "refused", "reason": "no LSTM", "sqnr_db": None, "equal": False}
    half = {"quantized": 1, "total": 2}
    good = {"scheme": "int4", "status": "ok", "reason": None, "sqnr_db": 21.25, "equal": False}
    good |= {"metric": "top1", "value": 0.5, "reference_value": 1.0, "products": half}
    record = about | {"toolchain": "grids", "status": "ok", "rows": [row, good], "sentence": None}
    assert table([record]).splitlines()[2] == (
        "| m | p==1 | k | 1 / 1 | 9 | int8: refused (no LSTM); int4: 21.2 dB, top1 0.5 of 1, 1 of 2 layers |"
    )


def test_samples_are_drawn_again_alike_and_no_face_comes_twice(packages: Path):
    pictures = packages / PICTURES / "skimage" / "data"
    first, second = (Material(pictures, packages) for _ in range(2))
    np.testing.assert_array_equal(first.crops(3, 16), second.crops(3, 16))
    np.testing.assert_array_equal(np.asarray(first.page(64)), np.asarray(second.page(64)))
    assert first.crops(3, 16).shape == (3, 16, 16, 3)
    material = Material(pictures, packages)
    drawn = [material.faces(100, 25) for _ in range(2)]
    patches, labels = (np.concatenate(part) for part in zip(*drawn, strict=True))
    assert len(np.unique(patches[:, 0, 0].round(3))) == len(patches) == 200
    np.testing.assert_array_equal(labels, patches[:, 0, 0] < 0.496)
    voice = material.voice(0.5)
    assert voice.shape == (8000,)
    assert 0.01 < np.abs(voice).max() < 2


def test_sources_are_pinned_and_have_names_of_their_own():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert all(source.package.count("==") + source.package.count("@") == 1 for source in SOURCES)


def test_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--packages", str(tmp_path), "--out", str(tmp_path / "o"), "--only", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
