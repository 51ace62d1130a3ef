"""Check `python -m experiments.backends`, which compares Quant-Trim with its float twin on every backend."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

from experiments import backends
from experiments.data import load
from qt_jax import records

GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 1, 8, 8] input) => (float[batch, 10] logits) {
        flat = Flatten(input)
        logits = MatMul(flat, kernel)
    }"""


@pytest.fixture
def folder(tmp_path):
    """Write the files of a finished run that this command reads."""
    run = tmp_path / "digits-tiny"
    run.mkdir()
    config = {"dataset": "digits", "model": "tiny", "seed": 0, "calibration_size": 16}
    (run / "config.json").write_text(json.dumps(config))
    for name, start in (("model", 20), ("twin", 30)):
        model = onnx.parser.parse_model(GRAPH)
        kernel = np.eye(64, dtype=np.float32)[:, start : start + 10]
        model.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "kernel"))
        onnx.save(model, run / f"{name}.onnx")
    row = {"method": "quant-trim", "epoch": 2, "commit": "abc", "versions": {}, "device": "cpu"}
    records.append(run / "metrics.jsonl", row)
    return run


def launch(folder, *more, others=()):
    choice = ("--backends", "onnxruntime", "--schemes", "int8-dynamic", "--runtimes", "reference")
    return backends.main(
        [str(folder), *map(str, others), *choice, "--out", str(folder.parent / "out"), *more]
    )


def test_both_networks_run_on_the_same_images_and_are_compared(folder, capsys):
    assert launch(folder, "--limit", "50") == 0
    rows = records.read(folder.parent / "out" / "records.jsonl")
    assert [(row["method"], row["scheme"]) for row in rows] == [
        (method, scheme) for method in ("quant-trim", "float") for scheme in ("fp32", "int8-dynamic")
    ]
    assert {(row["n"], row["task"], row["model"], row["data"]) for row in rows} == {
        (50, "digits", "tiny", rows[0]["data"])
    }
    assert rows[0]["training"]["commit"] == "abc" and rows[2]["training"] == {}
    assert rows[0]["checkpoint"] != rows[2]["checkpoint"]
    labels = load("digits", seed=0).test_labels[:50]
    assert 0 < rows[0]["top1"] < 1 and np.isclose(rows[0]["top1"] * 50, round(rows[0]["top1"] * 50))
    assert len(labels) == 50
    page = (folder.parent / "out" / "summary.md").read_text()
    assert "Quant-Trim" in page and "float twin" in page
    assert launch(folder, "--limit", "50") == 0
    assert "0 of 4 rows are new" in capsys.readouterr().out


def test_input_the_user_can_mend(folder, tmp_path, capsys):
    assert launch(tmp_path / "nothing") == 2
    assert "is not the folder of a run of experiments.cifar" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text().replace("digits", "cifar10"))
    assert launch(folder, others=[other]) == 2
    assert "several data sets (cifar10, digits)" in capsys.readouterr().err
    for name in ("model", "twin"):
        (folder / f"{name}.onnx").unlink()
    assert launch(folder) == 2
    assert "finish the run" in capsys.readouterr().err
