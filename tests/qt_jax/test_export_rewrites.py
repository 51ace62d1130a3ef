"""Check dense layers on any rank, einsum and attention against JAX, and other rewrites by hand."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from qt_jax.export import to_onnx
from qt_jax.export.rewrites import drop_identities

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
    ("ijk,ijl->kl", (2, 3, 4), (2, 3, 5)),
    ("ij,kl->ijkl", (2, 3), (4, 5)),
    ("ij,ij->i", (2, 3), (2, 3)),
    ("bij,jkl->bikl", (2, 3, 4), (4, 5, 6)),
    ("ij,ij->", (2, 3), (2, 3)),
]


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS)
def test_einsum_is_a_matrix_product_of_batches(equation, left, right):
    terms, wanted = equation.replace(" ", "").split("->")
    batched = ",".join(f"n{term}" for term in terms.split(",")) + f"->n{wanted}"

    def forward(_, x, y):
        return jnp.einsum(batched, x, y)

    model = to_onnx(forward, {}, [left, right], layout="nhwc")
    assert {node.op_type for node in model.graph.node} <= {"MatMul", "Mul", "Transpose", "Reshape"}
    x, y = normal(2, *left), normal(2, *right)
    (found,) = ReferenceEvaluator(model).run(None, {"input_0": x, "input_1": y})
    np.testing.assert_allclose(found, np.einsum(batched, x, y), rtol=1e-5, atol=1e-5)


def test_a_layer_with_such_an_einsum(export):
    found = export(nn.Sequential([nn.Einsum((6, 2, 4), "btd,dhk->bthk")]), (5, 6), layout="nhwc")
    assert found.operators == {"MatMul": 1, "Add": 1, "Reshape": 1}


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


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda x: x.sum((1, 2)) / 30, ["ReduceMean"]),
        (lambda x: x.sum((1, 2)) * (1 / 30), ["ReduceMean"]),
        (lambda x: x.sum((1, 2)) / 29, ["ReduceSum", "Div"]),
        (lambda x: x.sum((1, 2)) / jnp.arange(1.0, 5.0), ["ReduceSum", "Div"]),
        (lambda x: nn.relu(x) / 30, ["Relu", "Div"]),
    ],
)
def test_sum_over_count_is_a_mean(forward, expected):
    with jax.numpy_rank_promotion("allow"):
        model = to_onnx(lambda _, x: forward(x), {}, (5, 6, 4), layout="nhwc")
        x = normal(2, 5, 6, 4)
        (found,) = ReferenceEvaluator(model).run(None, {"input": x})
        assert operators(model) == expected
        np.testing.assert_allclose(found, forward(x), rtol=1e-5, atol=1e-6)
