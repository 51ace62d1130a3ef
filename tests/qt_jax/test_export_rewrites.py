"""Check dense layers on any rank, einsum and attention against JAX, and other rewrites by hand."""

from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export import to_onnx
from qt_jax.export.rewrites import drop_identities, pad_tokens

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


KERNELS = [
    ("bthd,hdk->bthk", (5, 3, 4), (3, 4, 6), {"Transpose": 2, "MatMul": 1}),
    ("hdk,bthd->kbth", (5, 3, 4), (3, 4, 6), {"Transpose": 2, "MatMul": 1}),
    ("bgci,cij->bgij", (2, 4, 5), (4, 5, 6), {"Transpose": 2, "MatMul": 1}),
    ("bgij,cij->bgci", (2, 5, 6), (4, 5, 6), {"Transpose": 2, "MatMul": 1}),
    ("bhtd,hdk->bhtk", (3, 5, 4), (3, 4, 6), {"MatMul": 1}),
    ("bhtd,hdkl->bhtkl", (3, 5, 4), (3, 4, 6, 2), {"MatMul": 1, "Reshape": 1}),
    ("btghd,ghdk->btghk", (5, 2, 3, 4), (2, 3, 4, 6), {"Transpose": 2, "MatMul": 1}),
    ("btheg,heg->bth", (5, 3, 4, 2), (3, 4, 2), {"Transpose": 2, "Reshape": 2, "MatMul": 1}),
    ("bhd,hdk->bhk", (3, 4), (3, 4, 6), {"Transpose": 2, "MatMul": 1}),
]


@pytest.mark.parametrize(("equation", "shape", "kernel", "expected"), KERNELS)
def test_an_einsum_with_a_kernel_for_each_entry_of_an_axis(equation, shape, kernel, expected):
    weight, x = normal(*kernel), normal(2, *shape)
    first = equation.startswith("hdk,")

    def forward(variables, x):
        operands = (variables["params"]["kernel"], x)
        y = jnp.einsum(equation, *(operands if first else operands[::-1]))
        return jnp.moveaxis(y, 1, 0) if first else y

    model = to_onnx(forward, {"params": {"kernel": weight}}, shape, layout="nhwc")
    assert dict(Counter(operators(model))) == expected
    (found,) = ReferenceEvaluator(model).run(None, {"input": x})
    wanted = np.einsum(equation, *((weight, x) if first else (x, weight)))
    np.testing.assert_allclose(found, np.moveaxis(wanted, 1, 0) if first else wanted, rtol=1e-5, atol=1e-5)


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


class Tokens(nn.Module):
    """Put learned tokens before or behind a sequence, add positions, and apply a layer to each token."""

    before: int = 1
    behind: int = 0
    positions: bool = True

    @nn.compact
    def __call__(self, x):
        parts = []
        for name, count in (("before", self.before), ("", 0), ("behind", self.behind)):
            if count:
                token = self.param(name, nn.initializers.normal(1.0), (1, count, x.shape[-1]))
                parts.append(jnp.broadcast_to(token, (x.shape[0], count, x.shape[-1])))
            elif not name:
                parts.append(x)
        x = jnp.concatenate(parts, axis=1)
        if self.positions:
            x = x + self.param("positions", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        return nn.Dense(2)(nn.relu(x))


@pytest.mark.parametrize(("before", "behind"), [(1, 0), (2, 0), (0, 3), (1, 2)])
def test_tokens_are_rows_of_the_positions(before, behind, export):
    found = export(Tokens(before, behind), (4, 6), tolerance=1e-6)
    assert found.operators == {"Add": 2, "Pad": 1, "Relu": 1, "MatMul": 1}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.model.graph.initializer}
    wanted = np.array(found.variables["params"]["positions"])
    if before:
        wanted[:, :before] += found.variables["params"]["before"]
    if behind:
        wanted[:, -behind:] += found.variables["params"]["behind"]
    np.testing.assert_array_equal(held["positions"], wanted)


REPEATED = {"Concat": 2, "Expand": 1, "Shape": 1, "Relu": 1, "MatMul": 1, "Add": 1}


def test_tokens_without_positions_are_repeated(export):
    assert export(Tokens(positions=False), (4, 6)).operators == REPEATED


def test_tokens_of_one_image_are_joined(export):
    found = export(Tokens(), (4, 6), dynamic_batch=False, batch_sizes=(1,))
    assert found.operators == {"Concat": 1, "Add": 2, "Relu": 1, "MatMul": 1}


JOINED = {
    "tokens": ([("Concat", "a input", "x", {"axis": 1}), ("Add", "x rows", "output", {})], ["Pad", "Add"]),
    "tokens that differ": (
        [("Concat", "b input", "x", {"axis": 1}), ("Add", "x rows", "output", {})],
        ["Concat", "Add"],
    ),
    "positions that differ": (
        [("Concat", "a input", "x", {"axis": 1}), ("Add", "x all", "output", {})],
        ["Concat", "Add"],
    ),
    "a join that is read twice": (
        [
            ("Concat", "a input", "x", {"axis": 1}),
            ("Add", "x rows", "y", {}),
            ("Mul", "x y", "output", {}),
        ],
        ["Concat", "Add", "Mul"],
    ),
    "two tensors": (
        [
            ("Relu", "input", "r", {}),
            ("Concat", "a input r", "x", {"axis": 1}),
            ("Add", "x number", "output", {}),
        ],
        ["Relu", "Concat", "Add"],
    ),
    "more images": (
        [("Concat", "more input", "x", {"axis": 0}), ("Add", "x number", "output", {})],
        ["Concat", "Add"],
    ),
    "a number by feature": (
        [("Concat", "input a", "x", {"axis": -2}), ("Add", "feature x", "output", {})],
        ["Pad", "Add"],
    ),
    "a product": (
        [("Concat", "a input", "x", {"axis": 1}), ("Mul", "x rows", "output", {})],
        ["Concat", "Mul"],
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_join_with_constants_before_a_sum(name, build, check_equal):
    nodes, expected = JOINED[name]
    constants = {
        "a": np.broadcast_to(normal(1, 2, 3), (5, 2, 3)),
        "b": normal(5, 2, 3),
        "rows": normal(1, 6, 3),
        "all": normal(5, 6, 3),
        "number": np.float32(0.5),
        "more": np.broadcast_to(normal(1, 4, 3), (5, 4, 3)),
        "feature": normal(3),
    }
    model = build(nodes, constants, [5, 4, 3], output_rank=3)
    padded = pad_tokens(model)
    assert operators(padded) == expected
    check_equal(model, padded, normal(5, 4, 3))
