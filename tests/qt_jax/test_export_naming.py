"""Check the names of nodes and constants, and the leaf that a name stands for."""

import numpy as np

from qt_jax.export.naming import leaf_of, name_by_path

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_names_do_not_collide(build):
    constants = {"params/Relu/kernel": normal(4, 4), "params/deep/w": normal(4), "two": np.float32(2)}
    nodes = [
        ("Relu", "input", "a", {}),
        ("Gemm", "a params/Relu/kernel", "b", {}),
        ("Mul", "b params/deep/w", "c", {}),
        ("Mul", "c two", "d", {}),
        ("Mul", "d two", "output", {}),
    ]
    model = name_by_path(build(nodes, constants, [3, 4]))
    assert [node.name for node in model.graph.node] == [
        "Relu",
        "Relu_1",
        "deep/Mul",
        "deep/Mul_1",
        "deep/Mul_2",
    ]
    names = ["Relu/kernel", "deep/w", "deep/Mul_1/b", "deep/Mul_2/b"]
    assert [tensor.name for tensor in model.graph.initializer] == names


def test_a_constant_without_a_leaf_is_called_after_its_node(build):
    """Even where its own name looks like a path."""
    nodes = [("Reshape", "input merged/shape", "x", {}), ("Relu", "x", "output", {})]
    model = name_by_path(build(nodes, {"merged/shape": np.array([4, 3])}, [3, 4]))
    assert [node.name for node in model.graph.node] == ["Reshape", "Relu"]
    assert [tensor.name for tensor in model.graph.initializer] == ["Reshape/shape"]
    assert not any(tensor.metadata_props for tensor in model.graph.initializer)


def test_the_leaf_of_a_numbered_name():
    leaves = {"stem/kernel", "block_1", "block"}
    assert leaf_of("stem/kernel_12", leaves) == "stem/kernel"
    assert leaf_of("block_1", leaves) == "block_1"
    assert leaf_of("elsewhere", leaves) == "elsewhere"
