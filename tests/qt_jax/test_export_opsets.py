"""Check the decomposition of each operator that an older opset lacks, by ONNX's reference evaluator."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export.opsets import OPSETS, RESTATED, at_opset

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


AXES = {"axes": np.array([1, 2])}
CASES = {
    "hard swish": ("HardSwish", {}, {}),
    "gelu": ("Gelu", {}, {}),
    "gelu by tanh": ("Gelu", {}, {"approximate": "tanh"}),
    "layer norm": ("LayerNormalization", {"s": normal(5), "b": normal(5)}, {"epsilon": 1e-3}),
    "layer norm without bias": ("LayerNormalization", {"s": normal(5)}, {"axis": -1}),
    "layer norm of an image": (
        "LayerNormalization",
        {"s": normal(6, 4, 5), "b": normal(6, 4, 5)},
        {"axis": 1, "epsilon": 0.1},
    ),
    "group norm": (
        "GroupNormalization",
        {"s": normal(6), "b": normal(6)},
        {"num_groups": 3, "epsilon": 1e-3},
    ),
    "one group": ("GroupNormalization", {"s": normal(6), "b": normal(6)}, {"num_groups": 1, "epsilon": 0.1}),
    **{
        f"{operator}, kept {kept}": (operator, AXES, {"keepdims": kept})
        for operator in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")
        for kept in (0, 1)
    },
    "sum": ("ReduceSum", AXES, {"keepdims": 0}),
    "relu": ("Relu", {}, {}),
}


def one_node(operator, constants, attributes):
    rank = 4 if attributes.get("keepdims", 1) else 2
    node = helper.make_node(operator, ["input", *constants], ["output"], **attributes)
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 6, 4, 5])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["?"] * rank)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph([node], "main_graph", [given], [output], initializers)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20, 21])
def test_the_numbers_stay(name, opset):
    model = one_node(*CASES[name])
    restated = at_opset(model, opset)
    images = 3.0 * normal(2, 6, 4, 5)
    onnx.checker.check_model(restated)
    assert restated.opset_import[0].version == opset
    before, after = (ReferenceEvaluator(m).run(None, {"input": images})[0] for m in (model, restated))
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    for node in restated.graph.node:
        assert onnx.defs.get_schema(node.op_type, opset).since_version <= opset


def test_an_operator_that_is_there_stays_one_node():
    for name, (operator, constants, attributes) in CASES.items():
        since, _ = RESTATED.get(operator, (13, None))
        restated = at_opset(one_node(operator, constants, attributes), max(since, OPSETS[0]))
        assert [node.op_type for node in restated.graph.node] == [operator], name


def test_the_size_of_the_batch():
    nodes = [
        helper.make_node("Shape", ["input"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["s"], axis=0),
        helper.make_node("Expand", ["token", "s"], ["output"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])
    constants = {"rest": np.array([2]), "token": normal(1, 2)}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph(nodes, "main_graph", [given], [output], initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)])
    for opset in (13, 14, 15, 21):
        restated = at_opset(model, opset)
        onnx.checker.check_model(restated)
        (found,) = ReferenceEvaluator(restated).run(None, {"input": normal(3, 4)})
        np.testing.assert_array_equal(found, np.repeat(constants["token"], 3, axis=0))
