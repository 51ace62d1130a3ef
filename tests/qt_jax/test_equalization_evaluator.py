"""Test the evaluator of ONNX graphs in JAX, operator by operator, against onnxruntime."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qt_jax.equalization.evaluator import run_graph
from qt_jax.equalization.operators import OPERATORS
from qt_jax.errors import InvalidInput
from qt_jax.export.sessions import open_unoptimized

RNG = np.random.default_rng(0)
FLOAT = helper.make_tensor_value_info("unused", TensorProto.FLOAT, None).type


class Case(NamedTuple):
    """Hold a node: inputs that JAX traces, and constants behind them, None for one that is missing."""

    operator: str
    inputs: tuple = ()
    constants: tuple = ()
    attributes: dict = {}  # noqa: RUF012 - never changed
    outputs: int = 1
    opset: int = 17


def normal(*shape):
    """Draw float32 numbers."""
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return np.abs(normal(*shape)) + np.float32(0.1)


def ints(*values):
    return np.array(values, np.int64)


def model_of(case):
    """Build a graph of the case's node."""
    named = {f"x{place}": array for place, array in enumerate(case.inputs)}
    held = {f"c{place}": array for place, array in enumerate(case.constants)}
    inputs = [*named, *(name if array is not None else "" for name, array in held.items())]
    outputs = [f"y{place}" for place in range(case.outputs)]
    node = helper.make_node(case.operator, inputs, outputs, name="layer", **case.attributes)
    entries = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in named.items()
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items() if array is not None]
    graph = helper.make_graph([node], "g", entries, [onnx.ValueInfoProto(name=n) for n in outputs], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model), named


def check(case, tolerance=1e-5):
    """Compare a case with onnxruntime, traced and with every input known."""
    model, named = model_of(case)
    if case.operator in BY_REFERENCE:
        expected = ReferenceEvaluator(model).run(None, named)
    else:
        expected = open_unoptimized(model).run(None, named)
    traced = jax.jit(lambda inputs: run_graph(model, inputs))(named)
    for name, value in zip((entry.name for entry in model.graph.output), expected, strict=True):
        found = np.asarray(traced[name])
        assert found.shape == value.shape
        if value.dtype.kind == "f":
            np.testing.assert_allclose(
                found,
                value,
                rtol=0,
                atol=tolerance * np.max(np.abs(value), initial=1e-3, where=np.isfinite(value)),
            )
            assert found.dtype == value.dtype
        else:
            np.testing.assert_array_equal(found, value)


BY_REFERENCE = {"Swish", "RMSNormalization"}
"""Operators that onnxruntime lacks on CPUs; onnx's own reference in numpy stands for it."""

X = normal(2, 3, 5, 6)
MATRIX = normal(4, 6)
UNARY = (
    *(
        "Abs",
        "Ceil",
        "Floor",
        "Sign",
        "Sin",
        "Cos",
        "Tan",
        "Sinh",
        "Cosh",
        "Tanh",
        "Neg",
        "Round",
        "Exp",
        "Erf",
    ),
    *(
        "Relu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "HardSwish",
        "Identity",
        "Atan",
        "Asinh",
        "LeakyRelu",
        "Elu",
    ),
    *("Selu", "Celu", "HardSigmoid", "ThresholdedRelu", "Softmax", "LogSoftmax", "IsNaN", "IsInf"),
)
REDUCED = ("Mean", "Sum", "Prod", "Max", "Min", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")

ELEMENTWISE = [
    *(Case(name, (3 * normal(2, 3, 4),)) for name in UNARY),
    *(Case(name, (positive(2, 3),)) for name in ("Sqrt", "Log", "Reciprocal")),
    *(Case(name, (np.clip(normal(2, 3), -0.9, 0.9),)) for name in ("Asin", "Acos", "Atanh")),
    Case("Acosh", (positive(2, 3) + 1,)),
    Case("LeakyRelu", (X,), (), {"alpha": 0.3}),
    Case("Elu", (X,), (), {"alpha": 0.5}),
    Case("Selu", (X,), (), {"alpha": 1.5, "gamma": 0.7}),
    Case("Celu", (X,), (), {"alpha": 0.5}),
    Case("HardSigmoid", (3 * X,), (), {"alpha": 0.3, "beta": 0.4}),
    Case("Swish", (X,), (), {"alpha": 1.5}, opset=24),
    Case("Mish", (3 * X,), opset=18),
    Case("Gelu", (3 * X,), opset=20),
    Case("Gelu", (3 * X,), (), {"approximate": "tanh"}, opset=20),
    Case("PRelu", (X,), (positive(3, 1, 1),)),
    Case("PRelu", (X,), (positive(1),)),
    Case("Softmax", (X,), (), {"axis": 1}),
    Case("LogSoftmax", (X,), (), {"axis": -2}),
    *(Case(name, (X, normal(3, 1, 6))) for name in ("Add", "Sub", "Mul")),
    *(Case(name, (X,), (positive(6),)) for name in ("Div", "Mul", "Add")),
    *(
        Case(name, (np.float32([1, 2, 3]),), (np.float32([[2], [3]]),))
        for name in ("Equal", "Greater", "Less")
    ),
    *(Case(name, (np.float32([1, 2, 3]),), (np.float32(2),)) for name in ("GreaterOrEqual", "LessOrEqual")),
    *(Case(name, (normal(2, 3) > 0, normal(3) > 0)) for name in ("And", "Or", "Xor")),
    Case("Not", (normal(2, 3) > 0,)),
    *(Case(name, (X, normal(5, 1), normal(1))) for name in ("Max", "Min", "Sum", "Mean")),
    Case("Where", (normal(2, 3) > 0, normal(3), normal(2, 1))),
    Case("Pow", (X,), (np.float32(2),)),
    Case("Pow", (X,), (np.int64(3),)),
    Case("Pow", (positive(2, 3),), (normal(3),)),
    Case("Pow", (positive(2, 3),), (np.float32(0.5),)),
    Case("Div", (np.int32([-7, 7, 8]), np.int32([2, -2, 3]))),
    Case("Mod", (np.int32([-7, 7, 8]), np.int32([2, -3, 3]))),
    Case("Mod", (np.float32([-7.5, 7, 8]), np.float32([2, -3, 3])), (), {"fmod": 1}),
    Case("Clip", (X,), (np.float32(-0.5), np.float32(0.5))),
    Case("Clip", (X,), (None, np.float32(0.5))),
    Case("Clip", (X,)),
    Case("Cast", (3 * X,), (), {"to": TensorProto.INT64}),
    Case("Cast", (np.int32([1, 0]),), (), {"to": TensorProto.BOOL}),
    Case("CastLike", (3 * X,), (np.int32(1),)),
]

REDUCTIONS = [
    *(
        Case(f"Reduce{name}", (positive(2, 3, 4),), (), {"axes": [1], "keepdims": 0})
        for name in REDUCED
        if name != "Sum"
    ),
    *(Case(f"Reduce{name}", (positive(2, 3, 4),), (ints(-1, 0),), opset=18) for name in REDUCED),
    Case("ReduceMean", (X,), (), {"keepdims": 0}),
    Case("ReduceSum", (X,), (ints(2, 3),), {"keepdims": 0}),
    Case("ReduceSum", (X,), (), {"noop_with_empty_axes": 1}),
    Case("ReduceProd", (np.int32([[2, 3], [4, 5]]),), (), {"axes": [1]}),
    *(Case(name, (np.float32([[1, 3, 3], [2, 0, 0]]),), (), {"axis": 1}) for name in ("ArgMax", "ArgMin")),
    Case(
        "ArgMax",
        (np.float32([[1, 3, 3], [2, 0, 2]]),),
        (),
        {"axis": -1, "select_last_index": 1, "keepdims": 0},
    ),
    Case("CumSum", (normal(3, 4),), (np.int64(1),)),
    Case("CumSum", (normal(3, 4),), (np.int64(0),), {"exclusive": 1, "reverse": 1}),
    Case("TopK", (normal(3, 7),), (ints(3),), {"axis": 1}, outputs=2),
    Case("TopK", (normal(5, 3),), (ints(2),), {"axis": 0, "largest": 0}, outputs=2),
]

MOVEMENTS = [
    Case("Shape", (X,)),
    Case("Shape", (X,), (), {"start": 1, "end": -1}),
    Case("Size", (X,)),
    Case("Reshape", (X,), (ints(0, -1, 2),)),
    Case("Reshape", (normal(0, 3),), (ints(3, 0),), {"allowzero": 1}),
    *(Case("Flatten", (X,), (), {"axis": axis}) for axis in (0, 1, 3, -1)),
    Case("Transpose", (X,)),
    Case("Transpose", (X,), (), {"perm": [0, 2, 3, 1]}),
    Case("Squeeze", (normal(1, 3, 1),)),
    Case("Squeeze", (normal(1, 3, 1),), (ints(-1),)),
    Case("Unsqueeze", (normal(3, 4),), (ints(0, -1),)),
    Case("Expand", (normal(3, 1),), (ints(2, 1, 4),)),
    Case("Concat", (X, normal(2, 1, 5, 6)), (normal(2, 2, 5, 6),), {"axis": 1}),
    Case("Split", (normal(2, 7),), (ints(2, 5),), {"axis": 1}, outputs=2),
    Case("Split", (normal(6, 2),), (), {}, outputs=3),
    Case("Split", (normal(2, 7),), (), {"axis": -1, "num_outputs": 3}, outputs=3, opset=18),
    Case("Slice", (X,), (ints(1, 5), ints(3, -100), ints(2, 3), ints(1, -2))),
    Case("Slice", (X,), (ints(-2), ints(2**63 - 1), ints(-1))),
    Case("Slice", (X,), (ints(0, 1), ints(1, 2))),
    Case("Slice", (normal(5),), (ints(3), ints(1))),
    Case("Gather", (X,), (np.int64(-1),), {"axis": 2}),
    Case("Gather", (X,), (np.array([[0, -1], [2, 1]]),), {"axis": 1}),
    Case("Gather", (MATRIX, np.array([[0, -1], [2, 1]]))),
    Case("GatherElements", (normal(3, 4), RNG.integers(-4, 4, (2, 3))), (), {"axis": 1}),
    Case("GatherND", (normal(3, 4, 2),), (np.array([[[0, 1]], [[2, -1]]]),)),
    Case("ScatterND", (normal(4, 3),), (np.array([[0], [2]]), normal(2, 3))),
    Case("ScatterND", (normal(4, 3),), (np.array([[0, 1], [2, 2]]), normal(2)), {"reduction": "add"}),
    Case("Pad", (X,), (ints(0, 0, 1, 2, 0, 1, 0, 3), np.float32(1.5))),
    Case("Pad", (X,), (ints(0, 0, -1, 2, 0, 0, 1, -2),)),
    Case("Pad", (X,), (ints(1, 2, 2, 1), None, ints(2, 3)), {"mode": "reflect"}, opset=18),
    Case("Pad", (X,), (ints(0, 0, 1, 2, 0, 1, 0, 3),), {"mode": "edge"}),
    Case("Pad", (X,), (ints(0, 0, 1, 2, 0, 1, 0, 3),), {"mode": "wrap"}, opset=19),
    Case("Tile", (MATRIX,), (ints(2, 3),)),
    Case("ConstantOfShape", (), (ints(2, 3),)),
    Case("ConstantOfShape", (), (ints(2),), {"value": numpy_helper.from_array(np.int64([7]))}),
    Case("Range", (), (np.int64(2), np.int64(9), np.int64(3))),
    Case("OneHot", (np.array([[1, -1]]),), (np.int64(3), np.float32([0.5, 2]))),
    Case("OneHot", (np.array([1, 2]),), (ints(4), np.float32([0, 1])), {"axis": 0}),
    Case("Trilu", (MATRIX,)),
    Case("Trilu", (MATRIX,), (np.int64(-1),), {"upper": 0}),
    *(
        Case("DepthToSpace", (normal(2, 12, 2, 3),), (), {"blocksize": 2, "mode": mode})
        for mode in ("DCR", "CRD")
    ),
    Case("SpaceToDepth", (normal(2, 3, 4, 6),), (), {"blocksize": 2}),
    Case("Dropout", (X,)),
    *(
        Case("Constant", (), (), {name: value})
        for name, value in (("value_float", 2.5), ("value_ints", [1, 2]))
    ),
    Case("Constant", (), (), {"value": numpy_helper.from_array(MATRIX)}),
]

PRODUCTS = [
    Case("MatMul", (normal(2, 3, 4),), (normal(4, 5),)),
    Case("MatMul", (normal(3, 4),), (normal(2, 1, 4, 5),)),
    Case("MatMul", (normal(2, 3, 4), normal(2, 4, 5))),
    Case("MatMul", (normal(2, 3, 4),), (normal(4),)),
    Case("MatMul", (normal(4), normal(4, 2))),
    Case("Gemm", (MATRIX,), (normal(6, 3), normal(3))),
    Case("Gemm", (MATRIX,), (normal(6, 3),)),
    Case(
        "Gemm", (MATRIX,), (normal(3, 4), normal(6, 1)), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}
    ),
    Case("Einsum", (normal(2, 3, 4), normal(2, 4, 5)), (), {"equation": "bij, bjk -> bik"}),
]

CHANNELS = (positive(4), normal(4))
NORMALIZATIONS = [
    Case("BatchNormalization", (normal(2, 4, 5),), (*CHANNELS, normal(4), positive(4)), {"epsilon": 1e-3}),
    Case("BatchNormalization", (normal(3, 4),), (*CHANNELS, normal(4), positive(4))),
    Case("LayerNormalization", (normal(2, 3, 4),), CHANNELS),
    Case("LayerNormalization", (normal(2, 3, 4),), (positive(3, 4),), {"axis": 1, "epsilon": 0.1}, outputs=3),
    Case("InstanceNormalization", (normal(2, 4, 5, 3),), CHANNELS, {"epsilon": 0.1}),
    Case("GroupNormalization", (normal(2, 8, 3, 3),), CHANNELS, {"num_groups": 4}, opset=18),
    Case("GroupNormalization", (normal(2, 4, 3, 3),), CHANNELS, {"num_groups": 2, "epsilon": 0.1}, opset=21),
    Case("RMSNormalization", (normal(2, 3, 4),), (positive(4),), {"axis": -1}, opset=23),
    *(Case("LpNormalization", (MATRIX,), (), {"axis": 0, "p": p}) for p in (1, 2)),
    *(Case("LRN", (X,), (), {"size": size, "alpha": 0.3, "beta": 0.6, "bias": 2.0}) for size in (3, 5)),
]

WINDOWS = [
    Case("Conv", (X,), (normal(4, 3, 3, 3), normal(4)), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    Case("Conv", (X,), (normal(4, 3, 2, 2),), {"dilations": [2, 1], "pads": [0, 1, 1, 0]}),
    Case("Conv", (X,), (normal(4, 3, 3, 2),), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("Conv", (X,), (normal(4, 3, 3, 2),), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("Conv", (X,), (normal(4, 3, 3, 2),), {"auto_pad": "VALID"}),
    Case("Conv", (X,), (normal(4, 3, 1, 1), normal(4))),
    Case("Conv", (X,), (normal(4, 3, 1, 1), normal(4)), {"strides": [2, 2]}),
    Case("Conv", (normal(2, 4, 6, 5),), (normal(6, 2, 3, 3),), {"group": 2, "pads": [1, 1, 1, 1]}),
    Case(
        "Conv", (X,), (normal(3, 1, 3, 2), normal(3)), {"group": 3, "pads": [1, 0, 2, 1], "strides": [2, 1]}
    ),
    Case("Conv", (X,), (normal(3, 1, 2, 2),), {"group": 3, "dilations": [2, 3]}),
    Case("Conv", (X,), (normal(6, 1, 3, 3),), {"group": 3}),
    Case("Conv", (normal(2, 3, 9),), (normal(4, 3, 3),), {"strides": [2]}),
    Case("Conv", (normal(1, 2, 4, 5, 3),), (normal(3, 2, 2, 2, 2),)),
    Case("ConvTranspose", (X,), (normal(3, 4, 2, 2), normal(4)), {"strides": [2, 2]}),
    Case("ConvTranspose", (X,), (normal(3, 4, 3, 3),), {"strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("ConvTranspose", (X,), (normal(3, 4, 3, 3),), {"strides": [3, 2], "output_padding": [2, 1]}),
    Case("ConvTranspose", (X,), (normal(3, 4, 3, 2),), {"dilations": [2, 1], "strides": [2, 2]}),
    Case("ConvTranspose", (normal(1, 4, 3, 3),), (normal(4, 3, 2, 3),), {"group": 2, "strides": [2, 2]}),
    Case("ConvTranspose", (X,), (normal(3, 4, 3, 3),), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", (X,), (normal(3, 4, 3, 3),), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("ConvTranspose", (X,), (normal(3, 4, 3, 3),), {"strides": [2, 2], "output_shape": [10, 12]}),
    Case("ConvTranspose", (normal(2, 3, 5),), (normal(3, 2, 4),), {"strides": [2]}),
    Case("MaxPool", (X,), (), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("MaxPool", (X,), (), {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "dilations": [1, 2]}),
    Case("MaxPool", (X,), (), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", (normal(2, 3, 7),), (), {"kernel_shape": [2], "strides": [2], "ceil_mode": 1}),
    Case("AveragePool", (X,), (), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("GlobalAveragePool", (X,)),
    Case("GlobalMaxPool", (X,)),
]

SCALES = np.float32([1, 1, 2, 1.5])
SHRINKING = np.float32([1, 1, 0.6, 0.5])
RESIZED = [
    *(
        Case("Resize", (X,), (None, scales), {"coordinate_transformation_mode": coordinates, **mode})
        for scales in (SCALES, SHRINKING)
        for coordinates in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for mode in ({"mode": "linear"}, {"mode": "nearest", "nearest_mode": "floor"})
    ),
    *(
        Case("Resize", (X,), (None, None, ints(2, 3, 8, 9)), {"mode": "nearest", "nearest_mode": rounding})
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
    Case("Resize", (X,), (None, None, ints(2, 3, 1, 4)), {"coordinate_transformation_mode": "align_corners"}),
    Case("Resize", (X,), (None, SCALES), {"mode": "cubic", "cubic_coeff_a": -0.5}),
    Case("Resize", (X,), (None, SHRINKING), {"mode": "cubic", "exclude_outside": 1}),
    Case(
        "Resize",
        (X,),
        (None, SCALES),
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
        opset=19,
    ),
    Case("Resize", (X,), (None, None, ints(8, 9)), {"mode": "linear", "axes": [2, 3]}, opset=18),
]

CASES = [*ELEMENTWISE, *REDUCTIONS, *MOVEMENTS, *PRODUCTS, *NORMALIZATIONS, *WINDOWS, *RESIZED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_an_operator_computes_what_onnxruntime_does(case):
    check(case)


def test_every_operator_has_a_case():
    assert {case.operator for case in CASES} == set(OPERATORS)


@st.composite
def pools(draw):
    """Draw a pool and its image."""
    size = draw(st.integers(1, 9))
    window, stride, dilation = (draw(st.integers(1, 4)) for _ in range(3))
    before, behind = (draw(st.integers(0, window - 1)) for _ in range(2))
    assume(size + before + behind >= (window - 1) * dilation + 1)
    attributes = {
        "kernel_shape": [window],
        "strides": [stride],
        "pads": [before, behind],
        "dilations": [dilation],
        "ceil_mode": draw(st.integers(0, 1)),
    }
    return np.random.default_rng(0).standard_normal((1, 2, size)).astype(np.float32), attributes


@settings(max_examples=25)
@given(pools(), st.booleans())
def test_average_pools_count_as_onnxruntime_does(pool, include):
    image, attributes = pool
    check(Case("AveragePool", (image,), (), {**attributes, "count_include_pad": int(include)}, opset=19))


@settings(max_examples=25)
@given(pools())
def test_max_pools_have_the_windows_of_onnxruntime(pool):
    image, attributes = pool
    check(Case("MaxPool", (image,), (), attributes))


def graph_of(nodes, shape, tensors=(), opset=17):
    """Build a graph from x, of a shape, to y."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    held = [numpy_helper.from_array(value, name) for name, value in dict(tensors).items()]
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def test_shapes_that_a_graph_computes_are_known_while_jax_traces():
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["batches"]),
        helper.make_node("Mul", ["whole", "two"], ["doubled"]),
        helper.make_node("Concat", ["batches", "doubled"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    tensors = {"first": np.int64(0), "axes": ints(0), "whole": ints(3), "two": ints(2)}
    model, x = graph_of(nodes, ["n", 2, 3], tensors), normal(4, 2, 3)
    found = jax.jit(lambda x: run_graph(model, {"x": x})["y"])(x)
    np.testing.assert_array_equal(found, x.reshape(4, 6))


def test_gradients_with_respect_to_initializers_are_those_of_differences():
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1], group=2),
        helper.make_node("HardSwish", ["h"], ["a"]),
        helper.make_node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ConvTranspose", ["p", "u"], ["y"], strides=[2, 2]),
    ]
    tensors = {"w": normal(2, 1, 3, 3), "b": normal(2), "u": normal(2, 3, 2, 2)}
    model, x = graph_of(nodes, [2, 2, 4, 4], tensors), normal(2, 2, 4, 4)
    aim = normal(2, 3, 4, 4)

    def loss(weights):
        return jnp.sum(run_graph(model, {"x": x}, weights)["y"] * aim)

    gradients = jax.jit(jax.grad(loss))(tensors)
    session_of = lambda weights: open_unoptimized(graph_of(nodes, [2, 2, 4, 4], weights))  # noqa: E731
    for name, value in tensors.items():
        step = np.zeros_like(value)
        step.flat[1] = 1e-2
        ahead, behind = (
            float(np.sum(session_of({**tensors, name: moved}).run(None, {"x": x})[0] * aim))
            for moved in (value + step, value - step)
        )
        assert gradients[name].ravel()[1] == pytest.approx((ahead - behind) / 2e-2, rel=2e-2, abs=2e-2)


def test_what_products_multiply_can_be_changed():
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "b"], ["y"], name="second"),
    ]
    tensors = {"w": normal(3, 2), "v": normal(3, 4), "b": normal(4)}
    seen = []

    def halved(node, position, value, constant):
        seen.append((node.name, position, constant))
        return value / 2 if constant else value + 1

    x = normal(5, 2)
    found = run_graph(graph_of(nodes, ["n", 2], tensors), {"x": x}, operand=halved)["y"]
    expected = (np.maximum((x + 1) @ tensors["w"].T / 2, 0) + 1) @ tensors["v"] / 2 + tensors["b"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert seen == [("first", 0, False), ("first", 1, True), ("second", 0, False), ("second", 1, True)]


@pytest.mark.parametrize(
    ("node", "opset", "message"),
    [
        (helper.make_node("Det", ["x"], ["y"], name="it"), 17, 'node "it" is a Det, an operator that is not'),
        (helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), 17, "is a com.microsoft.Gelu"),
        (helper.make_node("Relu", ["x"], ["y"]), 12, "opset 12: convert it to opset 13 or later"),
        (helper.make_node("Relu", ["z"], ["y"], name="it"), 17, 'node "it" reads z: give all inputs'),
        (
            helper.make_node("Expand", ["x", "x"], ["y"]),
            17,
            "sizes depend on the values of the graph's inputs",
        ),
        (helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[1]), 17, "cannot give i in JAX"),
    ],
)
def test_a_graph_that_cannot_run_is_refused_in_one_sentence(node, opset, message):
    model = graph_of([node], [1, 2, 2], opset=opset)
    with pytest.raises(InvalidInput, match=message):
        run_graph(model, {"x": np.ones((1, 2, 2), np.float32)})
