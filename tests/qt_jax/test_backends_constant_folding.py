"""Check what is computed before a compiler sees a graph that leaves it no arithmetic on shapes."""

import numpy as np

from qt_jax.backends import constant_folding
from qt_jax.export import graph

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


def test_constants_are_computed_and_keep_their_leaf(build):
    constants = {"params/head/kernel": normal(5, 4), "two": np.float32(2)}
    nodes = [
        ("Transpose", "params/head/kernel", "transposed", {"perm": [1, 0]}),
        ("Mul", "transposed two", "doubled", {}),
        ("MatMul", "input doubled", "output", {}),
    ]
    model = build(nodes, constants, [3, 4])
    folded = constant_folding.fold_constants(model)
    assert operators(folded) == ["MatMul"]
    held = graph.constants(folded)
    ((name, value),) = held.items()
    assert held.flax_path(name) == "head/kernel"
    np.testing.assert_array_equal(value, 2 * constants["params/head/kernel"].T)


def test_a_constant_output_is_still_computed_by_a_node(build, check_equal):
    nodes = [("Neg", "one", "output", {})]
    model = build(nodes, {"one": np.ones((2, 4), np.float32)}, [2, 4])
    folded = constant_folding.fold_constants(model)
    assert operators(folded) == ["Neg"]
    check_equal(model, folded, normal(2, 4))


def test_a_shape_with_an_open_size_is_left_to_be_computed(build):
    nodes = [("Shape", "input", "sizes", {}), ("Reshape", "input sizes", "output", {})]
    assert operators(constant_folding.known_shapes(build(nodes, {}, ["batch", 4]))) == ["Shape", "Reshape"]
    assert operators(constant_folding.known_shapes(build(nodes, {}, [2, 4]))) == ["Reshape"]


def test_the_part_of_a_shape_that_is_asked_for(build, check_equal):
    part = {"start": -1, "end": 2}
    nodes = [
        ("Shape", "input", "last", part),
        ("Concat", "one last", "sizes", {"axis": 0}),
        ("Expand", "row sizes", "rows", {}),
        ("Add", "input rows", "output", {}),
    ]
    constants = {"one": np.array([1], np.int64), "row": normal(1, 4)}
    model = build(nodes, constants, ["batch", 4])
    folded = constant_folding.fold_constants(constant_folding.known_shapes(model))
    assert operators(folded) == ["Add"]
    check_equal(model, folded, normal(2, 4))
