"""Check the folding of batch norm and arithmetic by feature on graphs made by hand."""

import numpy as np
import pytest

from qt_jax.export import folding, graph

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def operators(model):
    return [node.op_type for node in model.graph.node]


def test_gains_of_several_foldings_are_multiplied(build):
    column = RNG.uniform(0.5, 2, (4, 1, 1)).astype(np.float32)
    constants = {"params/c/kernel": normal(4, 4, 1, 1), "column": column, "two": np.float32(2)}
    constants |= {"v": RNG.uniform(0.5, 2, 4).astype(np.float32)}
    nodes = [
        ("Conv", "input params/c/kernel", "x", {}),
        ("BatchNormalization", "x v v v v", "y", {"epsilon": 1e-3}),
        ("Mul", "y column", "z", {}),
        ("Div", "z two", "output", {}),
    ]
    model = build(nodes, constants, ["batch", 4, 5, 5], 4)
    folded = folding.fold_affine(folding.fold_affine(folding.fold_batch_norm(model)))
    held = graph.constants(folded)
    (kernel,) = (name for name in held if held.flax_path(name) == "c/kernel")
    scale = constants["v"].astype(np.float64)
    gains = scale / np.sqrt(scale + 1e-3) * column.ravel().astype(np.float64) / 2
    np.testing.assert_allclose(held.gains[kernel], gains, rtol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_batch_norm_against_float64(bias, group, build):
    kernel, scale, shift, mean = normal(4, 4 // group, 1, 1), normal(4), normal(4), normal(4)
    variance = RNG.uniform(0.1, 2, 4).astype(np.float32)
    constants = {"params/c/kernel": kernel, "params/c/bias": normal(4), "params/n/scale": scale}
    constants |= {"params/n/bias": shift, "batch_stats/n/mean": mean, "batch_stats/n/var": variance}
    statistics = "params/n/scale params/n/bias batch_stats/n/mean batch_stats/n/var"
    nodes = [
        ("Conv", "input params/c/kernel" + " params/c/bias" * bias, "x", {"group": group}),
        ("BatchNormalization", f"x {statistics}", "output", {"epsilon": 1e-3}),
    ]
    folded = folding.fold_batch_norm(build(nodes, constants, ["batch", 4, 5, 5], 4))
    assert operators(folded) == ["Conv"]
    held = graph.constants(folded)
    values = {held.flax_path(name): value for name, value in held.items()}
    gain = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + 1e-3)
    start = constants["params/c/bias"] if bias else 0.0
    np.testing.assert_allclose(values["c/kernel"][:, :, 0, 0], kernel[:, :, 0, 0] * gain[:, None], rtol=1e-6)
    np.testing.assert_allclose(values["c/bias"], (start - mean) * gain + shift, rtol=1e-5, atol=1e-6)


def test_batch_norm_stays_where_the_convolution_is_read_twice(build, check_equal):
    constants = {"params/c/kernel": normal(4, 4, 1, 1), "v": np.ones(4, np.float32)}
    nodes = [
        ("Conv", "input params/c/kernel", "x", {}),
        ("BatchNormalization", "x v v v v", "y", {"epsilon": 1e-5}),
        ("Add", "x y", "output", {}),
    ]
    model = build(nodes, constants, ["batch", 4, 5, 5], 4)
    folded = folding.fold_batch_norm(model)
    assert operators(folded) == operators(model)
    check_equal(model, folded, normal(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("operator", "shape", "attributes"),
    [
        ("ConvTranspose", (4, 6, 2, 3), {"strides": [2, 2]}),
        ("ConvTranspose", (4, 3, 2, 3), {"group": 2}),
        ("Gemm", (4, 6), {}),
        ("Gemm", (6, 4), {"transB": 1}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_other_layers(operator, shape, attributes, bias, build, check_equal):
    constants = {"params/c/kernel": normal(*shape), "params/c/bias": normal(6)} | {
        f"params/n/{name}": normal(6) for name in ("scale", "bias", "mean")
    }
    constants["params/n/var"] = RNG.uniform(0.1, 2, 6).astype(np.float32)
    norm = "x params/n/scale params/n/bias params/n/mean params/n/var"
    nodes = [
        (operator, "input params/c/kernel" + " params/c/bias" * bias, "x", attributes),
        ("BatchNormalization", norm, "output", {"epsilon": 1e-3}),
    ]
    images = normal(3, 4, 5, 6) if len(shape) == 4 else normal(3, 4)
    model = build(nodes, constants, [3, *images.shape[1:]], images.ndim)
    folded = folding.fold_batch_norm(model)
    assert operators(folded) == [operator]
    check_equal(model, folded, images)


@pytest.mark.parametrize(
    "product",
    [
        ("MatMul", "input w", {}),
        ("Gemm", "input w", {}),
        ("Gemm", "input v", {"transB": 1}),
    ],
)
@pytest.mark.parametrize("addition", ["x bias", "row x"])
def test_product_and_addition_become_gemm(product, addition, build, check_equal):
    operator, inputs, attributes = product
    constants = {"w": normal(4, 5), "v": normal(5, 4), "bias": normal(5), "row": normal(1, 5)}
    nodes = [(operator, inputs, "x", attributes), ("Add", addition, "output", {})]
    model = build(nodes, constants, [3, 4])
    folded = folding.fold_shift(model)
    assert operators(folded) == ["Gemm"]
    check_equal(model, folded, normal(3, 4))


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("constant", ["column", "scalar"])
@pytest.mark.parametrize("layer", ["Gemm", "Conv", "ConvTranspose"])
def test_arithmetic_by_feature_becomes_the_layer_s(operator, bias, constant, layer, build, check_equal):
    square = layer == "Gemm"
    constants = {
        "params/c/kernel": normal(4, 4) if square else normal(4, 4, 3, 3),
        "params/c/bias": normal(4),
        "column": RNG.uniform(0.5, 2, 4 if square else (4, 1, 1)).astype(np.float32),
        "scalar": np.float32(0.7),
    }
    inputs = "input params/c/kernel" + " params/c/bias" * bias
    nodes = [(layer, inputs, "x", {}), (operator, f"x {constant}", "output", {})]
    images = normal(2, 4) if square else normal(2, 4, 5, 5)
    model = build(nodes, constants, [*images.shape], images.ndim)
    folded = folding.fold_affine(model)
    assert operators(folded) == [layer]
    check_equal(model, folded, images)


@pytest.mark.parametrize("operator", ["Sub", "Div"])
def test_a_constant_minus_or_over_a_layer_stays(operator, build, check_equal):
    nodes = [("Gemm", "input w", "x", {}), (operator, "row x", "output", {})]
    model = build(nodes, {"w": np.eye(4, 5, dtype=np.float32) + 1, "row": normal(5)}, [3, 4])
    folded = folding.fold_affine(model)
    assert operators(folded) == ["Gemm", operator]
    check_equal(model, folded, 1 + normal(3, 4) ** 2)


def test_a_product_of_longer_tensors_keeps_its_addition(build, check_equal):
    nodes = [("MatMul", "input w", "x", {}), ("Add", "x row", "output", {})]
    model = build(nodes, {"w": normal(4, 5), "row": normal(5)}, [2, 3, 4], 3)
    folded = folding.fold_affine(model)
    assert operators(folded) == ["MatMul", "Add"]
    check_equal(model, folded, normal(2, 3, 4))


def test_a_bias_for_each_feature_of_an_image_only(build, check_equal):
    """A bias of (4, 1, 1) is one number per channel. A bias of (1, 5) is one per column."""
    constants = {"w": normal(4, 4, 1, 1), "channels": normal(4, 1, 1), "columns": normal(1, 5)}
    for bias, expected in (("channels", ["Conv"]), ("columns", ["Conv", "Add"])):
        nodes = [("Conv", "input w", "x", {}), ("Add", f"{bias} x", "output", {})]
        model = build(nodes, constants, [2, 4, 5, 5], 4)
        folded = folding.fold_shift(model)
        assert operators(folded) == expected
        check_equal(model, folded, normal(2, 4, 5, 5))
