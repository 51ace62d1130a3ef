"""Layer sensitivity: the grid is the vendor's, a choice rounds what it names, the test set stays shut."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from experiments import layers
from qt_jax import records


@pytest.fixture
def graph():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 1, 8, 8] input) => (float[batch, 10] logits) {
            flat = Flatten<axis = 1>(input)
            hidden = MatMul(flat, first)
            logits = MatMul(hidden, second)
        }""")
    random = np.random.default_rng(0)
    for name, shape in (("first", (64, 16)), ("second", (16, 10))):
        value = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def test_only_the_named_kernel_is_rounded_and_to_the_vendors_grid(graph):
    before, after = layers.kernels(graph), layers.kernels(layers.rounded(graph, {"first"}))
    np.testing.assert_array_equal(after["second"], before["second"])
    scale = 2 * np.abs(before["first"]).max() / 15
    expected = np.clip(np.round(before["first"] / scale), -8, 7) * scale
    np.testing.assert_allclose(after["first"], expected, rtol=1e-5, atol=1e-6)


def test_command_appends_a_row_for_each_choice(graph, tmp_path, capsys):
    config = {"dataset": "digits", "model": "linear", "seed": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    onnx.save(graph, tmp_path / "model.onnx")
    assert layers.main([str(tmp_path)]) == 0
    rows = records.read(tmp_path / "layers.jsonl")
    choices = ["none", "first", "second", "all", "all but first", "all but second"]
    assert [row["rounded"] for row in rows] == choices
    assert {(row["split"], row["n"], row["method"]) for row in rows} == {("validation", 144, "quant-trim")}
    quality = {row["rounded"]: row["sqnr_db"] for row in rows}
    assert quality["none"] is None and quality["all"] < quality["first"]
    assert quality["all but first"] == quality["second"]
    assert "all but first" in capsys.readouterr().out
    assert layers.main([str(tmp_path), "--json"]) == 0
    read = capsys.readouterr()
    assert [json.loads(line) for line in read.out.splitlines()] == records.read(tmp_path / "layers.jsonl")[6:]
    assert "all but first" in read.err and "\x1b" not in read.err


@pytest.mark.parametrize("config", [None, {"dataset": "digits"}])
def test_a_folder_without_a_finished_run_is_refused(config, tmp_path, capsys):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert layers.main([str(tmp_path)]) == 2
    assert "experiments.cifar" in " ".join(capsys.readouterr().err.split())
