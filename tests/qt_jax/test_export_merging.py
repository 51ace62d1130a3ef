"""Check that batch and heads stay two axes where the program splits them again, and numbers stay too."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from qt_jax.export.merging import keep_axes
from qt_jax.export.rewrites import drop_identities

RNG = np.random.default_rng(0)
HEADS, FEATURES = 2, 4


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


class MergedHeads(nn.Module):
    """Attend on (batch * heads, tokens, features), as diffusers does; `scale` multiplies the scores."""

    scale: float | None = None

    @nn.compact
    def __call__(self, x):
        batch, tokens, width = x.shape

        def split(y):
            y = y.reshape(batch, tokens, HEADS, width // HEADS).transpose(0, 2, 1, 3)
            return y.reshape(batch * HEADS, tokens, width // HEADS)

        q, k, v = (split(nn.Dense(width, use_bias=False, name=name)(x)) for name in "qkv")
        scores = jnp.einsum("bid,bjd->bij", q, k)
        scores = scores if self.scale is None else scores * self.scale
        y = jnp.einsum("bij,bjd->bid", nn.softmax(scores, axis=-1), v)
        y = y.reshape(batch, HEADS, tokens, width // HEADS).transpose(0, 2, 1, 3)
        return nn.Dense(3, name="out")(y.reshape(batch, tokens, width))


ATTENTION = {"MatMul": 6, "Reshape": 4, "Transpose": 4, "Softmax": 1, "Add": 1}


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_attention_on_merged_heads_holds_no_reshape_for_them(dynamic_batch, export):
    sizes = (1, 7) if dynamic_batch else (1,)
    found = export(MergedHeads(), (5, 8), dynamic_batch=dynamic_batch, batch_sizes=sizes)
    assert found.operators == ATTENTION


def test_a_scale_of_the_scores_goes_into_the_kernel_of_the_queries(export):
    found = export(MergedHeads(scale=0.25), (5, 8))
    assert found.operators == ATTENTION
    kernels = {tensor.name: tensor for tensor in found.model.graph.initializer}
    held = np.frombuffer(kernels["q/kernel"].raw_data, np.float32).reshape(8, 8)
    np.testing.assert_array_equal(held, 0.25 * found.variables["params"]["q"]["kernel"])


WITHIN = {
    "nothing": [],
    "an activation": [("Relu", "x", "x", {})],
    "a number": [("Mul", "x number", "x", {})],
    "numbers by token": [("Add", "x tokens", "x", {})],
    "numbers by token, of full rank": [("Add", "x full", "x", {})],
    "the tensor itself": [("Mul", "x x", "x", {})],
    "a softmax of tokens": [("Softmax", "x", "x", {"axis": 1})],
    "a layer norm": [("LayerNormalization", "x scale", "x", {"axis": -1})],
    "a layer norm of tokens": [("LayerNormalization", "x tokens_scale", "x", {"axis": 1})],
    "a product": [("MatMul", "x square", "x", {})],
    "two orders": [
        ("Transpose", "x", "x", {"perm": [0, 2, 1]}),
        ("Transpose", "x", "x", {"perm": [0, 2, 1]}),
    ],
    "a bound": [("Clip", "x  number", "x", {})],
}
CONSTANTS = {
    "number": np.float32(0.7),
    "tokens": normal(5, 1),
    "full": normal(1, 5, FEATURES),
    "by_row": normal(6, 1, 1),
    "scale": normal(FEATURES),
    "tokens_scale": normal(5, FEATURES),
    "square": normal(FEATURES, FEATURES),
    "merged": np.array([6, 5, FEATURES]),
    "split": np.array([3, HEADS, 5, FEATURES]),
    "rows": np.array([30, FEATURES]),
    "axis": np.array([0]),
}


def around(build, steps, shape="split", rank=4):
    """Build a graph that merges axes, takes the steps, and reshapes to `shape`."""
    nodes, last = [("Reshape", "input merged", "x0", {})], "x0"
    for number, (operator, inputs, _, attributes) in enumerate(steps, 1):
        read = " ".join(last if name == "x" else name for name in inputs.split(" "))
        last = f"x{number}"
        nodes.append((operator, read, last, attributes))
    nodes.append(("Reshape", f"{last} {shape}", "output", {}))
    return build(nodes, CONSTANTS, [3, HEADS, 5, FEATURES], output_rank=rank, opset=18)


@pytest.mark.parametrize("name", WITHIN)
def test_an_operator_between_merge_and_split(name, build, check_equal):
    model = around(build, WITHIN[name])
    kept = drop_identities(keep_axes(model))
    assert operators(kept) == ([operator for operator, *_ in WITHIN[name]] or ["Identity"])
    check_equal(model, kept, normal(3, HEADS, 5, FEATURES))


ALONG = {
    "a softmax": [("Softmax", "x", "x", {"axis": 0})],
    "an order": [("Transpose", "x", "x", {"perm": [1, 0, 2]}), ("Transpose", "x", "x", {"perm": [1, 0, 2]})],
    "numbers": [("Add", "x by_row", "x", {})],
    "a sum": [("ReduceSum", "x axis", "y", {"keepdims": 1}), ("Expand", "x merged", "x", {})],
}


@pytest.mark.parametrize("name", ALONG)
def test_what_works_along_the_merged_axis_keeps_the_merge(name, build):
    model = around(build, ALONG[name])
    assert keep_axes(model) is model


def test_two_merges_are_not_better_than_one(build):
    """Were both activations to work before the merge, each would need a Reshape behind it."""
    nodes = [
        ("Reshape", "input merged", "a", {}),
        ("Relu", "a", "b", {}),
        ("Sigmoid", "a", "c", {}),
        ("ReduceSum", "b axis", "d", {}),
        ("ReduceSum", "c axis", "e", {}),
        ("Mul", "d e", "output", {}),
    ]
    model = build(nodes, CONSTANTS, [3, HEADS, 5, FEATURES], output_rank=3, opset=18)
    assert keep_axes(model) is model


def test_rows_are_reshaped_at_once(build, check_equal):
    model = around(build, [("Relu", "x", "x", {})], shape="rows", rank=2)
    kept = keep_axes(model)
    assert operators(kept) == ["Relu", "Reshape"]
    check_equal(model, kept, normal(3, HEADS, 5, FEATURES))
