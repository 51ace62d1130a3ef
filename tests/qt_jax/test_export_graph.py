"""Check that rebuilding a graph drops what is dead, and that constants keep their origin through a pass."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import qt_jax
from qt_jax.export import graph
from qt_jax.export.graph import ORIGIN, Constants

PACKAGE = Path(qt_jax.__file__).parent
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


def test_rebuild_drops_what_no_output_needs(build):
    model = build(
        [("Relu", "input", "output", {}), ("Add", "input params/dead", "nowhere", {})],
        {"params/dead": normal(4), "unused": normal(3)},
        [2, 4],
    )
    model.graph.value_info.append(helper.make_tensor_value_info("output", TensorProto.FLOAT, [99]))
    rebuilt = graph.rebuild(model, model.graph.node, graph.constants(model))
    assert operators(rebuilt) == ["Relu"]
    assert not rebuilt.graph.initializer and not rebuilt.graph.value_info


def test_origins_travel_as_metadata_and_by_reference(build):
    model = build([("Add", "input params/a/bias", "output", {})], {"params/a/bias": normal(4)}, [2, 4])
    values = graph.constants(model)
    assert values.origins == {"params/a/bias": "params/a/bias"}
    large = values.derive("params/a/bias", "wide", normal(2000, 4))
    plain = values.add("plain", normal(4))
    nodes = [
        helper.make_node("Add", ["input", large], ["x"]),
        helper.make_node("Add", ["x", plain], ["output"]),
    ]
    with graph.weights_by_reference():
        rebuilt = graph.rebuild(model, nodes, values)
        assert graph.constants(rebuilt).origins == {large: "params/a/bias"}
        assert graph.constants(rebuilt).gains == {large: 1.0}
        assert rebuilt.ByteSize() < 2000
        whole = graph.with_weights(rebuilt)
    np.testing.assert_array_equal(graph.constants(whole)[large], values[large])
    named = graph.rebuild(model, nodes, dict(values))
    assert not any(tensor.metadata_props for tensor in named.graph.initializer)


def test_leaves_of_one_name_have_their_module_in_common():
    origins = {
        "hi": "params/cell/hi/kernel",
        "hf": "params/cell/hf/kernel",
        "bias": "params/cell/hi/bias",
        "other": "batch_stats/cell/kernel",
    }
    values = Constants(origins=origins)
    assert values.common_origin(["hi", "unknown"]) == "params/cell/hi/kernel"
    assert values.common_origin(["hi", "hf"]) == "params/cell/kernel"
    assert values.common_origin(["hi", "bias"]) == ""
    assert values.common_origin(["hi", "other"]) == ""
    assert values.common_origin(["unknown"]) == ""


def test_metadata_of_others_is_no_origin(build):
    model = build([("Add", "input b", "output", {})], {"b": normal(4)}, [2, 4])
    model.graph.initializer[0].metadata_props.add(key="other", value="params/b")
    assert graph.constants(model).origins == {}
    assert ORIGIN not in onnx.printer.to_text(graph.rebuild(model, model.graph.node, graph.constants(model)))


def test_the_modules_of_vendor_environments_need_numpy_and_onnx_alone():
    """The LiteRT backend imports them, as `backends.worker` does, where jax and onnx_ir are not installed."""
    absent = "jax", "flax", "onnx_ir", "onnxruntime", "jax2onnx"
    program = f"""
import importlib, sys, types
sys.modules |= dict.fromkeys({absent})
for name, folder in (("qt_jax", {str(PACKAGE)!r}), ("qt_jax.export", {str(PACKAGE / "export")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
for name in ("commuting", "folding", "graph", "layout", "operators", "rewrites", "storage"):
    importlib.import_module("qt_jax.export." + name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
