"""Check `insert_qdq` on small hand-written graphs, against numpy and ONNX's reference evaluator."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

import qt_jax as qt
from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import (
    Ranges,
    activation_encoding,
    encode_by_magnitude,
    per_tensor,
)
from qt_jax.export.integers import QDQ_BITS, deployed_config
from qt_jax.export.qdq import insert_qdq, quantized_tensors, same_grid_groups
from qt_jax.export.sessions import open_session
from qt_jax.export.storage import model_sha256
from qt_jax.export.verification import integer_kernels

ASYMMETRIC = qt.QuantSpec(8, symmetric=False)
X = np.random.default_rng(0).uniform(-1, 2, (2, 3, 6, 6)).astype(np.float32)
RNG = np.random.default_rng(1)


def build(nodes, weights, shape=("batch", 3, 6, 6), output="y", opset=17):
    """Make a checked graph, in which each node is called after its output."""
    for node in nodes:
        node.name = node.output[0]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    return shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def conv(name, source, channels=3, *, features=4, **attributes):
    """Make a 3x3 convolution and its weights."""
    kernel = RNG.normal(size=(features, channels, 3, 3)).astype(np.float32)
    weights = {f"{name}/kernel": kernel, f"{name}/bias": RNG.normal(size=features).astype(np.float32)}
    return helper.make_node("Conv", [source, *weights], [name], pads=[1] * 4, **attributes), weights


def ranged(model, layers, *, bits=(8, 8), high=4.0):
    """Make ranges: tensors on [-1, high], rectified ones on [0, high], kernels by their own magnitude."""
    spec = dataclasses.replace(ASYMMETRIC, bits=bits[1])
    grid = activation_encoding(-1.0, high, spec, "calibrated")
    tensors = dict.fromkeys(["input", *(name for node in model.graph.node for name in node.output)], grid)
    tensors["relu"] = activation_encoding(0.0, high, spec, "calibrated")
    inputs = {node.name: tensors[node.input[0]] for node in model.graph.node if node.name in layers}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kernels = {node.name: node.input[1] for node in model.graph.node if node.name in layers}
    for node in model.graph.node:
        if node.name in layers:
            axis = {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, 1)
            tensors[node.input[1]] = encode_by_magnitude(held[node.input[1]], qt.QuantSpec(bits[0]), axis)
    return Ranges(model_sha256(model), model.opset_import[0].version, tensors, inputs, kernels)


def residual(opset=17):
    first, weights = conv("first", "input")
    inner, more = conv("inner", "relu", 4)
    nodes = [
        first,
        helper.make_node("Relu", ["first"], ["relu"]),
        inner,
        helper.make_node("Add", ["relu", "inner"], ["add"]),
        helper.make_node("GlobalAveragePool", ["add"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "y/kernel", "y/bias"], ["y"]),
    ]
    head = {"y/kernel": RNG.normal(size=(4, 5)).astype(np.float32), "y/bias": np.ones(5, np.float32)}
    return build(nodes, weights | more | head, opset=opset)


def run(model, *names, x=X, optimize=False):
    return open_session(model, optimize=optimize).run(list(names) or None, {"input": x})


def test_one_layer_by_hand():
    """Compute Conv on integers: x on [-1, 3], w on its peak, bias at s_x s_w, all in float64."""
    node, weights = conv("y", "input", features=2)
    model = build([node], weights)
    ranges = ranged(model, ["y"], high=3.0)
    quantized = insert_qdq(model, ranges)
    step = 4.0 / 255
    x_hat = (np.clip(np.rint(X / np.float32(step)) + 64, 0, 255) - 64) * step
    scale = np.abs(weights["y/kernel"]).max(axis=(1, 2, 3)) / 127
    w_hat = np.rint(weights["y/kernel"] / scale[:, None, None, None]) * scale[:, None, None, None]
    bias = np.rint(weights["y/bias"] / (scale * step)) * scale * step
    padded = np.pad(x_hat, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows, w_hat) + bias[None, :, None, None]
    (learned,) = run(insert_qdq(model, ranges, learned_only=True))
    np.testing.assert_allclose(learned, expected, atol=1e-4)
    on_grid = (np.clip(np.rint(expected / step) + 64, 0, 255) - 64) * step
    assert np.mean(np.abs(run(quantized)[0] - on_grid) < 1e-5) > 0.99


def test_form_of_the_graph():
    model = residual()
    quantized = insert_qdq(model, ranged(model, ["first", "inner", "y"]), signed=True)
    onnx.checker.check_model(quantized, full_check=True)
    names = [node.name for node in quantized.graph.node]
    assert len(set(names)) == len(names) and {node.domain for node in quantized.graph.node} <= {"", "ai.onnx"}
    pairs = {name.rpartition("/")[0] for name in names if name.endswith("/QuantizeLinear")}
    assert pairs == {"input", "relu", "inner", "add", "mean", "flat"}
    assert names.count("relu/DequantizeLinear") == 1  # one pair, two readers
    assert [output.name for output in quantized.graph.output] == ["y"]
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    assert types["inner/kernel/quantized"] == TensorProto.INT8
    assert types["inner/bias/quantized"] == TensorProto.INT32
    assert types["relu/QuantizeLinear/zero_point"] == TensorProto.INT8
    assert "inner/kernel" not in types and "inner/bias" not in types
    recorded = {entry.name for entry in quantized.graph.value_info} | {"y"}
    assert recorded >= {name for node in quantized.graph.node for name in node.output}


def test_reference_evaluator_agrees_with_onnxruntime():
    model = residual(opset=21)  # the evaluator has no older DequantizeLinear
    for signed in (True, False):
        quantized = insert_qdq(model, ranged(model, ["first", "inner", "y"]), signed=signed)
        (expected,) = ReferenceEvaluator(quantized).run(None, {"input": X})
        np.testing.assert_allclose(run(quantized)[0], expected, atol=0.05)  # a tie may move by a step
        np.testing.assert_allclose(run(quantized, optimize=True)[0], expected, atol=0.05)


def test_signed_and_unsigned_are_the_same_numbers():
    model = residual()
    ranges = ranged(model, ["first", "inner", "y"])
    np.testing.assert_array_equal(
        *(run(insert_qdq(model, ranges, signed=signed))[0] for signed in (True, False))
    )


def test_every_layer_becomes_an_integer_kernel():
    model = residual()
    ranges = ranged(model, ["first", "inner", "y"])
    for signed in (True, False):
        assert integer_kernels(insert_qdq(model, ranges, signed=signed)) == dict.fromkeys(
            ("first", "inner", "y"), True
        )
    assert not all(integer_kernels(insert_qdq(model, ranges, learned_only=True)).values())
    assert not any(integer_kernels(model).values())


def test_layer_with_a_narrower_grid_requantizes_on_its_branch():
    model = residual()
    ranges = ranged(model, ["first", "inner", "y"])
    narrow = activation_encoding(0.0, 1.0, ASYMMETRIC, "learned")
    quantized = insert_qdq(model, dataclasses.replace(ranges, inputs=ranges.inputs | {"inner": narrow}))
    nodes = {node.name: node for node in quantized.graph.node}
    assert nodes["relu_1/QuantizeLinear"].input[0] == "relu/DequantizeLinear"
    assert nodes["inner"].input[0] == "relu_1/DequantizeLinear"
    assert nodes["add"].input[0] == "relu/DequantizeLinear"
    assert all(integer_kernels(quantized).values())


@pytest.mark.parametrize("bits", QDQ_BITS.values(), ids=QDQ_BITS)
def test_modes(bits):
    model = residual()
    if bits != (8, 8):
        with pytest.raises(InvalidInput, match=r"needs INT(4|16), which ONNX has from opset 21"):
            insert_qdq(model, ranged(model, ["first", "inner", "y"], bits=bits))
        model = residual(opset=21)
    ranges = ranged(model, ["first", "inner", "y"], bits=bits)
    quantized = insert_qdq(model, ranges, signed=True)
    onnx.checker.check_model(quantized, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    expected = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
    assert types["inner/kernel/quantized"] == expected[bits[0]]
    assert types["relu/QuantizeLinear/zero_point"] == expected[bits[1]]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored = next(t for t in quantized.graph.initializer if t.name == "inner/kernel/quantized")
    integers = numpy_helper.to_array(stored).astype(np.int32)
    np.testing.assert_array_equal(integers, ranges.tensors["inner/kernel"].integers(held["inner/kernel"]))
    assert np.abs(integers).max() == 2 ** (bits[0] - 1) - 1
    assert np.all(np.isfinite(run(quantized)[0]))


def test_one_scale_a_kernel():
    model = residual()
    ranges = ranged(model, ["first", "inner", "y"])
    tensors = {
        name: per_tensor(encoding) if "kernel" in name else encoding
        for name, encoding in ranges.tensors.items()
    }
    quantized = insert_qdq(model, dataclasses.replace(ranges, tensors=tensors))
    onnx.checker.check_model(quantized, full_check=True)
    scales = {tensor.name: list(tensor.dims) for tensor in quantized.graph.initializer}
    assert scales["inner/kernel/DequantizeLinear/scale"] == scales["inner/bias/DequantizeLinear/scale"] == []
    assert all(integer_kernels(quantized).values())


def test_clip_behind_a_convolution_is_absorbed():
    first, weights = conv("first", "input", group=3, features=3)
    last, more = conv("y", "clip")
    nodes = [first, helper.make_node("Clip", ["first", "low", "high"], ["clip"]), last]
    model = build(nodes, weights | more | {"low": np.float32(0), "high": np.float32(6)})
    ranges = ranged(model, ["first", "y"])
    six = activation_encoding(0.0, 6.0, ASYMMETRIC, "learned")
    ranges = dataclasses.replace(
        ranges, tensors=ranges.tensors | {"clip": six}, inputs=ranges.inputs | {"y": six}
    )
    assert all(integer_kernels(insert_qdq(model, ranges)).values())


def test_output_of_a_convolution_that_leaves_the_graph_is_quantized():
    node, weights = conv("y", "input")
    quantized = insert_qdq(build([node], weights), ranged(build([node], weights), ["y"]))
    assert [node.name for node in quantized.graph.node][-2:] == ["y/QuantizeLinear", "y/DequantizeLinear"]
    assert quantized.graph.node[-1].output[0] == quantized.graph.output[0].name == "y"
    values = np.unique(run(quantized)[0])
    assert len(values) <= 256 and integer_kernels(quantized) == {"y": True}


def test_matmul_between_norms_keeps_their_scale():
    """The initializer `norm/scale` and the scale of the tensor `norm` have different names."""
    weights = {
        "norm/scale": np.full(6, 3.0, np.float32),
        "dense/kernel": RNG.normal(size=(6, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["input", "norm/scale"], ["norm"]),
        helper.make_node("MatMul", ["norm", "dense/kernel"], ["dense"]),
        helper.make_node("Softmax", ["dense"], ["y"]),
    ]
    model = build(nodes, weights)
    quantized = insert_qdq(model, ranged(model, ["dense"], high=9.0))
    assert sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node) == 1
    assert integer_kernels(quantized) == {"dense": True}
    scale = next(tensor for tensor in quantized.graph.initializer if tensor.name == "norm/scale")
    np.testing.assert_array_equal(numpy_helper.to_array(scale), 3.0)


@pytest.mark.parametrize("pads", [0.0, -1.0])
def test_moved_numbers_share_a_grid(pads):
    """What is sliced, padded and joined again stays on the grid, unless other numbers than zero are added."""
    first, weights = conv("first", "input")
    last, more = conv("y", "padded", 4)
    numbers = {"start": [1], "stop": [2], "axis": [2], "pads": [0, 0, 1, 0, 0, 0, 0, 0]}
    weights |= more | {name: np.array(value) for name, value in numbers.items()}
    weights["number"] = np.float32(pads)
    nodes = [
        first,
        helper.make_node("Slice", ["first", "start", "stop", "axis"], ["row"]),
        helper.make_node("Concat", ["row", "first"], ["joined"], axis=2),
        helper.make_node("Pad", ["joined", "pads", "number"], ["padded"]),
        last,
    ]
    model = build(nodes, weights)
    wanted = quantized_tensors(model, {"first", "y"})
    if pads:
        assert wanted == {"first", "y"}
        return
    assert wanted == {"first", "row", "joined", "padded", "y"}
    groups = sorted(map(sorted, same_grid_groups(model, wanted)))
    assert groups == [["first", "joined", "padded", "row"], ["y"]]


def test_selection_behind_a_float_operator_is_float():
    """Each of its readers then rounds what it selects once, on its own grid."""
    kernels = {f"{name}/kernel": RNG.normal(size=(3, 4)).astype(np.float32) for name in ("a", "b")}
    halves = {"zero": [0], "three": [3], "six": [6], "axis": [1]}
    weights = kernels | {name: np.array(value) for name, value in halves.items()}
    nodes = [
        helper.make_node("Softmax", ["input"], ["soft"]),
        helper.make_node("Slice", ["soft", "zero", "three", "axis"], ["left"]),
        helper.make_node("Slice", ["soft", "three", "six", "axis"], ["right"]),
        helper.make_node("Gemm", ["left", "a/kernel"], ["a"]),
        helper.make_node("Gemm", ["right", "b/kernel"], ["b"]),
        helper.make_node("Mul", ["a", "b"], ["y"]),
    ]
    model = build(nodes, weights, ("batch", 6))
    assert quantized_tensors(model, {"a", "b"}) == set()


def test_encoder_and_decoder():
    """Max pool is on its input's grid. All tensors up to transposed convolution and concat are quantized."""
    first, weights = conv("first", "input")
    last, more = conv("y", "concat", 7)
    weights |= more | {"up/kernel": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32)}
    nodes = [
        first,
        helper.make_node("MaxPool", ["first"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ConvTranspose", ["pool", "up/kernel"], ["up"], strides=[2, 2]),
        helper.make_node("Concat", ["first", "up"], ["concat"], axis=1),
        last,
    ]
    model = build(nodes, weights)
    assert quantized_tensors(model, {"first", "up", "y"}) == {"first", "pool", "up", "concat", "y"}
    kernels = integer_kernels(insert_qdq(model, ranged(model, ["first", "up", "y"])))
    assert kernels == {"first": True, "up": False, "y": True}  # onnxruntime has no integer ConvTranspose


def test_operators_that_lead_to_float_ones_stay_float():
    first, weights = conv("first", "input")
    nodes = [
        first,
        helper.make_node("Add", ["first", "constant"], ["shifted"]),
        helper.make_node("Flatten", ["shifted"], ["flat"]),
        helper.make_node("Softmax", ["flat"], ["y"]),
    ]
    model = build(nodes, weights | {"constant": np.float32(1)})
    assert quantized_tensors(model, {"first"}) == {"first"}
    assert quantized_tensors(model, set()) == set()


def test_float_layer_stays_as_it_is():
    model = residual()
    quantized = insert_qdq(model, ranged(model, ["first", "y"]))
    nodes = {node.name: node for node in quantized.graph.node}
    assert list(nodes["inner"].input)[1:] == ["inner/kernel", "inner/bias"]


def test_ranges_of_another_graph_are_refused():
    model, other = residual(), residual()
    ranges = ranged(other, ["first", "inner", "y"])
    with pytest.raises(InvalidInput, match="of another graph"):
        insert_qdq(model, ranges)
    tensors = {name: value for name, value in ranges.tensors.items() if name != "add"}
    with pytest.raises(InvalidInput, match="these ranges lack add"):
        insert_qdq(other, dataclasses.replace(ranges, tensors=tensors))


def test_deployed_config_changes_bits_alone():
    config = qt.QuantConfig(
        weights=qt.QuantSpec(4, axis=-1), rules=(qt.Rule("head", weights=qt.QuantSpec(8), inputs=None),)
    )
    deployed = deployed_config(config, "int16-act")
    assert deployed.weights == qt.QuantSpec(8, axis=-1) and deployed.activations.bits == 16
    assert deployed.rules == (qt.Rule("head", weights=qt.QuantSpec(8), inputs=None),)
    with pytest.raises(InvalidInput, match="'int2' is unknown"):
        deployed_config(config, "int2")
