"""Check that what a graph computes several times is computed once, and that what differs stays."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.export.sharing import merge_equal, share_transposes

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


class Conditioned(nn.Module):
    """Add two functions of the same activation of an embedding, as the blocks of a diffusion U-Net do."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="embed")(x)
        return nn.Dense(3, name="one")(nn.swish(x)) * nn.Dense(3, name="two")(nn.swish(x))


def test_an_activation_that_two_blocks_apply_is_computed_once(export):
    found = export(Conditioned(), (5,))
    assert found.operators == {"Gemm": 3, "Sigmoid": 1, "Mul": 2}


class TiedTwice(nn.Module):
    """Call one layer twice on one tensor."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="layer")
        return nn.relu(layer(x)) * nn.sigmoid(layer(x))


def test_two_calls_of_one_layer_stay_two(export):
    assert export(TiedTwice(), (5,)).operators == {"Gemm": 2, "Relu": 1, "Sigmoid": 1, "Mul": 1}


def test_only_equal_nodes_are_merged(build, check_equal):
    """The same operator on other constants, with other attributes, or for an output of the graph is kept."""
    nodes = [
        ("LeakyRelu", "input", "a", {"alpha": 0.1}),
        ("LeakyRelu", "input", "b", {"alpha": 0.2}),
        ("LeakyRelu", "input", "c", {"alpha": 0.1}),
        ("Add", "a two", "d", {}),
        ("Add", "c three", "e", {}),
        ("Add", "c other_two", "f", {}),
        ("Mul", "b d", "g", {}),
        ("Mul", "e f", "h", {}),
        ("Sub", "g h", "i", {}),
        ("Sub", "g h", "output", {}),
    ]
    numbers = {"two": 2.0, "three": 3.0, "other_two": 2.0}
    model = build(nodes, {name: np.float32(value) for name, value in numbers.items()}, [2, 3])
    merged = merge_equal(model)
    assert operators(merged) == ["LeakyRelu", "LeakyRelu", "Add", "Add", "Mul", "Mul", "Sub"]
    check_equal(model, merged, normal(2, 3))


def test_equal_leaves_of_two_modules_are_two(build):
    nodes = [
        ("Add", "input params/a/bias", "a", {}),
        ("Add", "input params/b/bias", "b", {}),
        ("Mul", "a b", "output", {}),
    ]
    model = build(nodes, {f"params/{name}/bias": np.ones(3, np.float32) for name in "ab"}, [2, 3])
    assert operators(merge_equal(model)) == ["Add", "Add", "Mul"]


def attention(x, split):
    """Attend with queries, keys and values from one dense layer, of two heads."""
    batch, tokens, _ = x.shape
    q, k, v = split(nn.Dense(24)(x).reshape(batch, tokens, 3, 2, 4))
    scores = nn.softmax(jnp.matmul(q, jnp.swapaxes(k, -1, -2)), axis=-1)
    return jnp.matmul(scores, v).transpose(0, 2, 1, 3).reshape(batch, tokens, 8)


def by_split(qkv):
    return [part.squeeze(2).transpose(0, 2, 1, 3) for part in jnp.split(qkv, 3, axis=2)]


def by_index(qkv):
    return list(qkv.transpose(2, 0, 3, 1, 4))


@pytest.mark.parametrize("split", [by_split, by_index])
def test_queries_keys_and_values_of_one_layer_are_transposed_once(split, export_body):
    def body(x):
        return attention(x.reshape(x.shape[0], -1, 4), split).mean(1)

    found = export_body(body)
    assert found.operators == {
        "Conv": 1,
        "Transpose": 4,  # of the image, of all three, of the keys, and of what is attended to
        "Reshape": 3,
        "MatMul": 3,
        "Add": 1,
        "Gather": 3,
        "Softmax": 1,
        "ReduceMean": 1,
        "Gemm": 1,
    }


SHARED = {
    "slices": (
        [
            ("Slice", "input zeros ones axes", "a", {}),
            ("Slice", "input ones fours axes", "b", {}),
            ("Transpose", "a", "c", {"perm": [0, 2, 1]}),
            ("Transpose", "b", "d", {"perm": [0, 2, 1]}),
            ("Concat", "d c", "output", {"axis": 2}),
        ],
        ["Transpose", "Slice", "Slice", "Concat"],
    ),
    "a split": (
        [
            ("Split", "input two_two", "a b", {"axis": 1}),
            ("Transpose", "a", "c", {"perm": [0, 2, 1]}),
            ("Transpose", "b", "d", {"perm": [0, 2, 1]}),
            ("Concat", "d c", "output", {"axis": 2}),
        ],
        ["Transpose", "Split", "Concat"],
    ),
    "a split of which one part is not transposed": (
        [
            ("Split", "input one_one_two", "a b c", {"axis": 1}),
            ("Transpose", "a", "d", {"perm": [0, 2, 1]}),
            ("Transpose", "b", "e", {"perm": [0, 2, 1]}),
            ("Add", "d e", "f", {}),
            ("ReduceSum", "c axes", "g", {}),
            ("Add", "f g", "output", {}),
        ],
        ["Split", "Transpose", "Transpose", "Add", "ReduceSum", "Add"],
    ),
    "two orders": (
        [
            ("Slice", "input zeros ones axes", "a", {}),
            ("Slice", "input ones fours axes", "b", {}),
            ("Transpose", "a", "c", {"perm": [0, 2, 1]}),
            ("Transpose", "b", "d", {"perm": [2, 0, 1]}),
            ("ReduceSum", "d zeros", "e", {}),
            ("MatMul", "e c", "output", {}),
        ],
        ["Slice", "Slice", "Transpose", "Transpose", "ReduceSum", "MatMul"],
    ),
    "a part that is read as it is too": (
        [
            ("Slice", "input zeros ones axes", "a", {}),
            ("Slice", "input ones fours axes", "b", {}),
            ("Transpose", "a", "c", {"perm": [0, 2, 1]}),
            ("Transpose", "b", "d", {"perm": [0, 2, 1]}),
            ("MatMul", "c a", "e", {}),
            ("MatMul", "d b", "f", {}),
            ("Add", "e f", "output", {}),
        ],
        ["Slice", "Slice", "Transpose", "Transpose", "MatMul", "MatMul", "Add"],
    ),
}
ENDS = {
    "zeros": np.array([0]),
    "ones": np.array([1]),
    "fours": np.array([4]),
    "axes": np.array([1]),
    "two_two": np.array([2, 2]),
    "one_one_two": np.array([1, 1, 2]),
}


@pytest.mark.parametrize("name", SHARED)
def test_parts_that_are_transposed_alike(name, build, check_equal):
    nodes, expected = SHARED[name]
    model = build(nodes, ENDS, [2, 4, 3], output_rank=3, opset=18)
    shared = share_transposes(model)
    assert operators(shared) == expected
    check_equal(model, shared, normal(2, 4, 3))
