"""Test Arm Ethos-U: placement, estimates and errors anywhere; the reference model and Vela if installed."""

import json
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from qt_jax.backends import environments, ethos_u, evaluate, litert, tflite
from qt_jax.backends.ethos_u import ACCELERATORS, BACKEND, estimate, placed
from qt_jax.backends.protocol import KINDS, Refused
from tests.qt_jax.vendor_networks import CUBE, samples

SUMMARY = {
    "system_config": "Ethos_U55_High_End_Embedded",
    "memory_mode": "Shared_Sram",
    "core_clock": "500000000.0",
    "inference_time": "0.002",
    "cycles_total": "1000000",
    "nn_macs": "29864832",
    "sram_memory_used": "56.25",
    "dram_memory_used": "0.0",
    "on_chip_flash_memory_used": "1.0",
    "off_chip_flash_memory_used": "2.5",
    "sram_total_bytes": "508788",
    "dram_total_bytes": "0",
    "on_chip_flash_total_bytes": "24",
    "off_chip_flash_total_bytes": "1070784",
}


def test_its_description_is_complete_and_starts_from_litert():
    assert BACKEND.kind in KINDS
    assert BACKEND.available() is None
    assert all(requirement.count("==") == 1 for requirement in BACKEND.environment.requirements)
    others = {scheme.name: scheme for scheme in litert.BACKEND.schemes}
    for scheme in BACKEND.schemes:
        assert scheme.source == ("litert", scheme.name)
        other = others[scheme.name]
        assert (scheme.weight_bits, scheme.activation_bits) == (other.weight_bits, other.activation_bits)
        assert (scheme.per_channel, scheme.calibration) == (other.per_channel, other.calibration)


def test_operators_left_in_the_compiled_file_are_the_host_s():
    source = Counter(CONV_2D=8, ADD=2, MEAN=1)
    assert placed(source, Counter({"ethos-u": 3, "ADD": 1, "MEAN": 1})) == {
        "CONV_2D": {"integer": 8},
        "ADD": {"integer": 1, "host": 1},
        "MEAN": {"host": 1},
    }


def test_estimates_are_bytes_and_milliseconds():
    assert estimate(SUMMARY) == {
        "cycles": 1_000_000,
        "milliseconds": 2.0,
        "clock_hz": 5e8,
        "macs": 29_864_832,
        "sram_bytes": 57_600,
        "dram_bytes": 0,
        "flash_bytes": 3_584,
        "sram_moved_bytes": 508_788,
        "dram_moved_bytes": 0,
        "flash_moved_bytes": 1_070_808,
        "system_config": "Ethos_U55_High_End_Embedded",
        "memory_mode": "Shared_Sram",
    }


def program(folder, monkeypatch, body):
    """Put a fake of the environment's programs beside a fake interpreter."""
    file = folder / "tool"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_a_failing_program_refuses_in_its_last_words(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch, "echo starting; echo 'no such operator' >&2; exit 3")
    with pytest.raises(Refused, match="tool: starting\nno such operator"):
        ethos_u._tool("tool")
    program(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(Refused, match="tool: exit status 3"):
        ethos_u._tool("tool")


def test_vela_is_told_the_accelerator_and_its_memories(tmp_path, monkeypatch):
    told = []

    def tool(name, *arguments):
        told.append(arguments)
        folder = tmp_path / "out"
        folder.mkdir()
        rows = [",".join(SUMMARY), ",".join(SUMMARY.values())]
        (folder / "model_summary_any.csv").write_text("\n".join(rows) + "\n")

    monkeypatch.setattr(ethos_u, "_tool", tool)
    assert ethos_u._vela(tmp_path / "model.tflite", tmp_path / "out", "ethos-u55-128")["cycles"] == 1_000_000
    [arguments] = told
    for expected in ("ethos-u55-128", *ACCELERATORS["ethos-u55-128"]):
        assert expected in arguments


@pytest.mark.parametrize("status", ["TOSA_VALID", "TOSA_UNPREDICTABLE"])
def test_the_session_moves_between_float_and_the_grids(tmp_path, monkeypatch, status):
    """Give the reference model's outputs in the file's order, and expect them in that of the ONNX graph."""

    def described(index, *shape):
        return {"index": index, "dtype": np.int8, "quantization": (0.5, 3), "shape": np.array(shape)}

    seen = []

    def run(graph, inputs):
        seen.append((graph, *inputs))
        return [np.int8([[3, 5]]), np.arange(3, 9, dtype=np.int8).reshape(1, 1, 3, 2)], SimpleNamespace(
            name=status
        )

    image, logits, table = described(4, 1, 4, 5, 3), described(8, 1, 2), described(6, 1, 1, 3, 2)
    signature = SimpleNamespace(
        get_input_details=lambda: {"x": image},
        get_output_details=lambda: {"output_0": table, "output_1": logits},
    )
    model, runtime = ModuleType("tosa_reference_model"), ModuleType("ai_edge_litert.interpreter")
    model.run, model.GraphStatus = run, SimpleNamespace(TOSA_VALID=SimpleNamespace(name="TOSA_VALID"))
    runtime.Interpreter = lambda model_path: SimpleNamespace(
        get_input_details=lambda: [image],
        get_output_details=lambda: [logits, table],
        get_signature_runner=lambda: signature,
    )
    monkeypatch.setitem(sys.modules, "tosa_reference_model", model)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", runtime)
    (tmp_path / ethos_u.TOSA).write_bytes(b"TOSA")
    outputs = [
        ["output_0", [0, 3, 1, 2], [1, 2, 1, 3], "float32"],
        ["output_1", [0, 1], [1, 2], "float32"],
    ]
    (tmp_path / tflite.LAYOUT).write_text(json.dumps({"inputs": {"image": "x"}, "outputs": outputs}))
    session = BACKEND.load(tmp_path, BACKEND.schemes[0], BACKEND.runtimes[0])
    images = np.full((1, 3, 4, 5), 1.0, np.float32)
    if status != "TOSA_VALID":
        with pytest.raises(RuntimeError, match=status):
            session(images)
        return
    first, second = session(images)
    np.testing.assert_array_equal(first, np.float32([[[[0, 1, 2]], [[0.5, 1.5, 2.5]]]]))
    np.testing.assert_array_equal(second, np.float32([[0, 1]]))
    [(graph, quantized)] = seen
    assert graph == b"TOSA"
    np.testing.assert_array_equal(quantized, np.full((1, 4, 5, 3), 5, np.int8))


@pytest.mark.vendor
def test_the_reference_model_agrees_with_litert_s_reference_kernels(tmp_path):
    """Compare both on a graph without FULLY_CONNECTED: the integers are equal, and so are the records."""
    for environment in (BACKEND.environment, litert.BACKEND.environment):
        if reason := environments.missing(environment):
            pytest.skip(reason)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((16, 3, 8, 8)).astype(np.float32)
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 3, 8, 8] input) => (float[batch, 4] logits) {
            stem = Conv<pads = [1, 1, 1, 1]>(input, first)
            active = Relu(stem)
            head = Conv(active, second)
            mean = GlobalAveragePool(head)
            logits = Flatten(mean)
        }""")
    for name, shape in (("first", (16, 3, 3, 3)), ("second", (4, 16, 1, 1))):
        weights = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"input": images})[0].argmax(1)
    rows = evaluate(model, images, (images, labels), backends=["litert", "ethos-u"], folder=tmp_path)
    ours = {row["scheme"]: row for row in rows if row["backend"] == "ethos-u"}
    theirs = {row["scheme"]: row for row in rows if row["runtime"] == "reference"}
    assert {row["status"] for row in ours.values()} == {"ok"}, [row["reason"] for row in ours.values()]
    for name, row in ours.items():
        assert row["sqnr_db"] == pytest.approx(theirs[name]["sqnr_db"], abs=1e-6)
        assert row["cycles"] > 0
        assert set().union(*row["operators"].values()) == {"integer"}


@pytest.mark.vendor
def test_every_output_has_the_layout_of_the_onnx_graph(tmp_path):
    for environment in (BACKEND.environment, litert.BACKEND.environment):
        if reason := environments.missing(environment):
            pytest.skip(reason)
    rows = evaluate(
        CUBE,
        samples(CUBE, 24, 1),
        samples(CUBE, 8, 2),
        backends=["ethos-u"],
        schemes=["int8-pc-minmax"],
        folder=tmp_path,
    )
    [row] = [row for row in rows if row["backend"] == "ethos-u"]
    assert row["status"] == "ok", row["reason"]
    assert [(f["output"], f["shape"]) for f in row["fidelity"]] == [("map", [8, 8, 8]), ("logits", [5])]
    assert all(f["sqnr_db"] > 25 for f in row["fidelity"])
    assert row["products"] == {"quantized": 3, "total": 3}
