"""Check that activations traced as arithmetic become operators, and that their lookalikes do not."""

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import pytest

from qt_jax.export import graph
from qt_jax.export.activations import fold_activations


class Held(nn.Module):
    """Keeps its activation in a field."""

    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(5)(self.activation(nn.Dense(8)(x)))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.relu, "Relu"),
        (nn.relu6, "Clip"),
        (nn.leaky_relu, "LeakyRelu"),
        (lambda x: nn.leaky_relu(x, 0.3), "LeakyRelu"),
        (nn.hard_sigmoid, "HardSigmoid"),
        (nn.hard_swish, "HardSwish"),
        (nn.sigmoid, "Sigmoid"),
        (nn.tanh, "Tanh"),
    ],
)
def test_an_activation_in_a_field(activation, expected, export):
    assert export(Held(activation), (6,)).operators == {"Gemm": 2, expected: 1}


@pytest.mark.parametrize(
    "activation",
    [
        nn.gelu,
        lambda x: nn.gelu(x, approximate=False),
        nn.swish,
        nn.elu,
        nn.selu,
        nn.celu,
        nn.softplus,
        nn.hard_tanh,
        nn.log_sigmoid,
        nn.soft_sign,
    ],
)
@pytest.mark.parametrize("opset", [13, 21])
def test_others_are_right_in_one_form_or_another(activation, opset, export):
    export(Held(activation), (6,), opset=opset)


def test_prelu_keeps_its_slope(export):
    found = export(nn.Sequential([nn.Dense(8), nn.PReLU(), nn.Dense(5)]), (6,))
    assert {tensor.name for tensor in found.model.graph.initializer} >= {"layers_1/negative_slope"}


def hard_swish(three=3.0, sixth=1 / 6, high=6.0):
    """x * clip(x + three, 0, high) * sixth, and its constants."""
    nodes = [
        ("Add", "three input", "a", {}),
        ("Max", "zero a", "b", {}),
        ("Min", "b high", "c", {}),
        ("Mul", "c sixth", "d", {}),
        ("Mul", "d input", "output", {}),
    ]
    given = {"three": three, "sixth": sixth, "high": high, "zero": 0.0}
    return nodes, {name: np.float32(value) for name, value in given.items()}


LEAKY = [
    ("GreaterOrEqual", "input zero", "a", {}),
    ("Mul", "slope input", "b", {}),
    ("Where", "a input b", "output", {}),
]
LOOKALIKES = {
    "hard swish": (*hard_swish(), ["HardSwish"]),
    "of another shift": (*hard_swish(three=2.0), ["Add", "Clip", "Mul", "Mul"]),
    "of another slope": (*hard_swish(sixth=0.2), ["Add", "Clip", "Mul", "Mul"]),
    "of another bound": (*hard_swish(high=5.0), ["Add", "Clip", "Mul", "Mul"]),
    "hard sigmoid by division": (
        [
            ("Add", "input three", "a", {}),
            ("Clip", "a zero six", "b", {}),
            ("Div", "b six", "output", {}),
        ],
        {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)},
        ["HardSigmoid"],
    ),
    "six divided by it": (
        [
            ("Add", "input three", "a", {}),
            ("Clip", "a one six", "b", {}),
            ("Div", "six b", "output", {}),
        ],
        {"three": np.float32(3), "one": np.float32(1), "six": np.float32(6)},
        ["Add", "Clip", "Div"],
    ),
    "leaky": (LEAKY, {"zero": np.float32(0), "slope": np.float32(0.2)}, ["LeakyRelu"]),
    "leaky from one on": (
        LEAKY,
        {"zero": np.float32(1), "slope": np.float32(0.2)},
        ["GreaterOrEqual", "Mul", "Where"],
    ),
    "a slope for each feature": (
        LEAKY,
        {"zero": np.float32(0), "slope": np.full(4, 0.2, np.float32)},
        ["GreaterOrEqual", "Mul", "Where"],
    ),
    "clips within clips": (
        [
            ("Relu", "input", "a", {}),
            ("Clip", "a low high", "b", {}),
            ("Min", "b one", "output", {}),
        ],
        {"low": np.float32(-1), "high": np.float32(2), "one": np.float32(1)},
        ["Clip"],
    ),
    "bounds that exclude each other": (
        [("Max", "input two", "a", {}), ("Min", "a one", "output", {})],
        {"one": np.float32(1), "two": np.float32(2)},
        ["Max", "Min"],
    ),
    "one bound": (
        [("Min", "input one", "output", {})],
        {"one": np.float32(1)},
        ["Min"],
    ),
    "maximum with zero": ([("Max", "zero input", "output", {})], {"zero": np.float32(0)}, ["Relu"]),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_arithmetic(name, build, check_equal):
    nodes, constants, expected = LOOKALIKES[name]
    model = build(nodes, constants, [5, 4])
    folded = fold_activations(model)
    assert [node.op_type for node in folded.graph.node] == expected
    check_equal(model, folded, np.linspace(-8, 8, 20, dtype=np.float32).reshape(5, 4))


def test_a_hard_swish_s_sigmoid_is_kept_for_another_reader(build, check_equal):
    nodes, constants = hard_swish()
    nodes = [*nodes[:-1], ("Mul", "d input", "e", {}), ("Sub", "e d", "output", {})]
    model = build(nodes, constants, [3, 4])
    folded = fold_activations(model)
    assert sorted(node.op_type for node in folded.graph.node) == ["HardSigmoid", "HardSwish", "Sub"]
    assert not graph.constants(folded)
    check_equal(model, folded, np.linspace(-5, 5, 12, dtype=np.float32).reshape(3, 4))


def test_relu6_and_its_lookalike(build, check_equal):
    rng = np.random.default_rng(0)
    bounds = {"zero": np.float32(0), "six": np.float32([6]), "row": rng.normal(size=4).astype(np.float32)}
    clip = build([("Max", "zero input", "x", {}), ("Min", "x six", "output", {})], bounds, [3, 4])
    folded = fold_activations(clip)
    assert [node.op_type for node in folded.graph.node] == ["Clip"]
    check_equal(clip, folded, 10 * rng.normal(size=(3, 4)).astype(np.float32))
    lookalike = build([("Max", "input row", "x", {}), ("Min", "x six", "output", {})], bounds, [3, 4])
    assert [node.op_type for node in fold_activations(lookalike).graph.node] == ["Max", "Min"]
