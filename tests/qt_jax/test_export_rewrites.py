"""Check dense layers on any rank, einsum and attention against JAX, and other rewrites by hand."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qt_jax.errors import InvalidInput
from qt_jax.export.rewrites import drop_identities, einsum_to_matmul, fold_mean

RNG = np.random.default_rng(0)

EQUATIONS = [
    ("...qhd,...khd->...hqk", (2, 5, 3, 4), (2, 6, 3, 4)),
    ("...hqk,...khd->...qhd", (2, 3, 5, 6), (2, 6, 3, 4)),
    ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 6, 3, 4)),
    ("bhqk,bkhd->bqhd", (2, 3, 5, 6), (2, 6, 3, 4)),
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("ij,kj->ki", (3, 4), (5, 4)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("bij,bkj->bki", (2, 3, 4), (2, 5, 4)),
    ("b i j , b j k -> b i k", (2, 3, 4), (2, 4, 5)),
]


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


def einsum(equation, left, right):
    node = helper.make_node("Einsum", ["x", "y"], ["z"], equation=equation)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", left), ("y", right))
    ]
    rank = len(equation.replace("...", "B").split("->")[1].replace(" ", ""))
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * rank)
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=opsets)


@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS)
def test_einsum_is_a_matrix_product(equation, left, right):
    model = einsum_to_matmul(einsum(equation, left, right))
    assert {node.op_type for node in model.graph.node} <= {"MatMul", "Transpose"}
    x, y = RNG.normal(size=left), RNG.normal(size=right)
    x, y = x.astype(np.float32), y.astype(np.float32)
    (found,) = ReferenceEvaluator(model).run(None, {"x": x, "y": y})
    np.testing.assert_allclose(found, np.einsum(equation, x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("ijk,ijl->kl", (2, 3, 4), (2, 3, 5)),
        ("ij,kl->ijkl", (2, 3), (4, 5)),
        ("ij,ij->i", (2, 3), (2, 3)),
        ("bij,jkl->bikl", (2, 3, 4), (4, 5, 6)),
    ],
)
def test_an_einsum_that_is_none_is_refused(equation, left, right):
    with pytest.raises(InvalidInput, match=r"not a matrix product between single axes: write it"):
        einsum_to_matmul(einsum(equation, left, right))


def test_a_layer_with_such_an_einsum_is_named(export):
    with pytest.raises(InvalidInput, match=r"dhk.*layers_0/kernel.*nn\.DenseGeneral"):
        export(nn.Sequential([nn.Einsum((6, 2, 4), "btd,dhk->bthk")]), (5, 6))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6,), {"Gemm": 1}),
        ((5, 6), {"MatMul": 1, "Add": 1}),
        ((5, 4, 6), {"Conv": 1}),
        ((3, 5, 4, 6), {"MatMul": 1, "Add": 1}),
    ],
)
def test_a_dense_layer_on_any_rank(shape, bias, expected, export):
    """Features on images are channels, once the graph is channels-first."""
    found = export(nn.Dense(7, use_bias=bias), shape)
    if not bias:
        expected = {name: count for name, count in expected.items() if name != "Add"}
    assert found.operators == expected
    assert [tensor.name for tensor in found.model.graph.initializer] == ["kernel", "bias"][: 1 + bias]
    if len(shape) in (1, 3):
        assert [node.op_type for node in found.model.graph.node] == [*expected]


def test_two_dense_layers_on_a_sequence_hold_no_reshape(export):
    net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6), partial(jnp.mean, axis=1), nn.Dense(3)])
    assert export(net, (5, 4)).operators == {"MatMul": 2, "Add": 2, "Relu": 1, "ReduceMean": 1, "Gemm": 1}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.DenseGeneral((2, 4)), (5, 6)),
        (nn.DenseGeneral(7, axis=(-2, -1)), (5, 2, 3)),
        (nn.DenseGeneral(7, axis=(-2, -1), use_bias=False), (2, 3)),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), (4, 2, 3)),
        (nn.Einsum((6, 7), "btd,dk->btk"), (5, 6)),
    ],
)
def test_general_contractions(layer, shape, export):
    operators = export(nn.Sequential([layer, lambda x: x.reshape(x.shape[0], -1)]), shape).operators
    boundary = {"Transpose"} if len(shape) == 3 else set()
    assert set(operators) <= {"MatMul", "Gemm", "Add", "Reshape", "Flatten"} | boundary
    assert operators.get("MatMul", 0) + operators.get("Gemm", 0) == 1


class Attention(nn.Module):
    """One attention layer on a sequence; `across` reads keys from another."""

    causal: bool = False

    @nn.compact
    def __call__(self, x, memory=None):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, memory, memory, mask=mask)


def test_attention_is_two_matrix_products(export):
    found = export(Attention(), (5, 8))
    assert found.operators["MatMul"] == 6 and found.operators["Softmax"] == 1
    assert "Einsum" not in found.operators and found.operators["Transpose"] == 4
    weights = {tensor.name for tensor in found.model.graph.initializer}
    layers = ("query", "key", "value", "out")
    assert weights >= {f"attention/{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
    assert {f"attention/{layer}" for layer in layers} <= {node.name for node in found.model.graph.node}


def test_attention_across_two_inputs(export):
    export(Attention(), (5, 8), (7, 8))


def test_attention_under_a_mask(export):
    export(Attention(causal=True), (5, 8))


@pytest.mark.parametrize("last", ["Identity", "Dropout"])
def test_identities_vanish_also_before_the_output(last, build, check_equal):
    nodes = [
        ("Identity", "input", "a", {}),
        ("Relu", "a", "b", {}),
        ("Identity", "b", "c", {}),
        ("Neg", "c", "d", {}),
        (last, "d", "output", {}),
    ]
    model = build(nodes, {}, [2, 4])
    folded = drop_identities(model)
    assert operators(folded) == ["Relu", "Neg"]
    check_equal(model, folded, normal(2, 4))


@pytest.mark.parametrize(("divisor", "expected"), [(30, ["ReduceMean"]), (29, ["ReduceSum", "Div"])])
def test_sum_over_count_is_a_mean(divisor, expected, build, check_equal):
    constants = {"axes": np.array([1, 2]), "count": np.float32(divisor)}
    nodes = [("ReduceSum", "input axes", "x", {"keepdims": 0}), ("Div", "x count", "output", {})]
    model = build(nodes, constants, ["batch", 5, 6, 4], opset=18)
    folded = fold_mean(model)
    assert operators(folded) == expected
    check_equal(model, folded, normal(2, 5, 6, 4))


@pytest.mark.parametrize(
    "nodes",
    [
        [("Relu", "input", "x", {}), ("Div", "x count", "output", {})],
        [("ReduceSum", "input", "x", {}), ("Div", "x count", "output", {})],
        [("ReduceSum", "input axes", "x", {}), ("Div", "x vector", "output", {})],
    ],
)
def test_other_divisions_stay(nodes, build):
    constants = {"axes": np.array([1]), "count": np.float32(6), "vector": np.full(6, 6, np.float32)}
    model = build(nodes, constants, [3, 6])
    assert operators(fold_mean(model)) == operators(model)
