"""Find which channels of a float graph can be scaled without changing its function, and what absorbs it.

A positive factor passes through operators with f(s x) = s f(x): Relu, pooling, sums, movements of data. A
layer undoes the factors of what it reads and gives its outputs new ones: its kernel W becomes
f_out W / f_in, its bias f_out b, so that x f_in is mapped to (W x + b) f_out. The same is done by a batch
norm, and by the scale and bias of a layer norm. All terms of a sum have the same factors, so a residual
stream with everything that is added to it is one group. Whatever is not homogeneous (Sigmoid, Softmax, Gelu,
a product of two activations) keeps its values, and pins the factors of what it reads to 1. So do the inputs
and outputs of the graph, and every operator that this module does not know.

The factors of any tensor's elements are followed through Reshape, Transpose, Concat, Slice and the like by
running these operators on the labels themselves (`labels`). Hence heads of attention, channel shuffles and
classification tokens need no rules of their own.

Source: the rescaling of ReLU networks goes back to cross-layer equalization in Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.1.
"""

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from qt_jax.equalization.labels import compact, full, widened
from qt_jax.equalization.walk import Freedom, Rule, Values, Walk

PASSING = frozenset({"Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "Relu"})
"""Operators of one activation with f(s x) = s f(x) for s > 0, element by element."""

POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})

REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
"""Homogeneous reductions. The elements that are reduced together have one factor."""

SUMS = frozenset({"Add", "Max", "Mean", "Min", "Sub", "Sum"})
"""Homogeneous functions of several activations. All have the same factors."""

MOVEMENTS = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Reshape", "Slice", "SpaceToDepth", "Split"}
    | {"Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators that move elements, and so can be run on labels."""

SHAPE_ONLY = frozenset({"ConstantOfShape", "Shape", "Size"})
"""Operators whose result does not depend on the values that they read."""

STEERED = (MOVEMENTS | REDUCTIONS | {"Pad", "Resize", "Upsample"}) - {"Concat", "Gather"}
"""Operators whose inputs after the first tell what to do with it."""

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})


def find_freedom(model: onnx.ModelProto, values: Values) -> Freedom:
    """Find the factors of a graph that can be chosen without changing its function.

    Args:
      model: Float graph whose constants are initializers; each small one has one reader
        (`rescaling.with_own_constants`).
      values: Every tensor of the graph for one sample, by name. It tells the shapes, and the values of
        tensors that hold shapes or indices.

    >>> kernel = lambda name, value: onnx.numpy_helper.from_array(np.float32(value), name)
    >>> nodes = [
    ...     helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
    ...     helper.make_node("Relu", ["h"], ["r"]),
    ...     helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
    ... ]
    >>> x, y = (helper.make_tensor_value_info(name, 1, ["n", 2]) for name in "xy")
    >>> kernels = [kernel("a", [[1, 2, 3], [4, 5, 6]]), kernel("b", [[1, 2], [3, 4], [5, 6]])]
    >>> model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], kernels))
    >>> shapes = {"x": (1, 2), "h": (1, 3), "r": (1, 3), "y": (1, 2)}
    >>> found = find_freedom(model, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    >>> [(entry.initializer, entry.up.tolist(), entry.down.tolist()) for entry in found.scaled]
    [('a', [[1, 2, 3]], [[0], [0]]), ('b', [[0, 0]], [[1], [2], [3]])]
    """
    walk = Walk(model, values)
    for node in model.graph.node:
        walk.visit(node, _RULES.get(node.op_type), node.op_type in STEERED)
    for entry in model.graph.output:
        walk.pin(entry.name, "the graph puts it out")
    return walk.result()


def _passing(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray]:
    return {node.output[0]: walk.of(node.input[0])}


def _prelu(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    return _passing(walk, node, stated) if node.input[1] in walk.constants else None


def _cast(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    source, result = (walk.values.get(name) for name in (node.input[0], node.output[0]))
    same = source is not None and result is not None and source.dtype == result.dtype
    return _passing(walk, node, stated) if same else None


def _shape_only(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray]:
    return {}


def _clip(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Scale the bounds, which are one number for all channels: these have one factor, unless a bound is 0."""
    bounds = [name for name in node.input[1:] if name]
    if stated.keys() & {"min", "max"} or not all(map(walk.is_constant, bounds)):
        return None
    labels = walk.of(node.input[0])
    moved = [name for name in bounds if 0 < abs(walk.constants[name]) < np.finfo(np.float32).max]
    if moved:
        labels = walk.ties.along(labels, range(labels.ndim))
        for name in moved:
            walk.absorb(name, labels.reshape(()))
    return {node.output[0]: labels}


def _pool(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray]:
    labels = walk.of(node.input[0])
    return {node.output[0]: walk.ties.along(labels, range(2, labels.ndim))}


def _reduction(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray]:
    labels = walk.of(node.input[0])
    given = walk.values[node.input[1]] if len(node.input) > 1 and node.input[1] else stated.get("axes", ())
    axes = [int(axis) % labels.ndim for axis in np.ravel(given)]
    if not axes and not stated.get("noop_with_empty_axes"):
        axes = list(range(labels.ndim))
    labels = walk.ties.along(labels, axes)
    return {node.output[0]: labels if stated.get("keepdims", 1) else np.squeeze(labels, tuple(axes))}


def _resize(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    before, after = walk.shape(node.input[0]), walk.shape(node.output[0])
    if stated.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        return None
    labels = walk.of(node.input[0])
    axes = [axis % labels.ndim for axis in stated.get("axes", range(labels.ndim))]
    place = 1 if node.op_type == "Upsample" else 2
    scales = np.ravel(walk.values[node.input[place]]) if len(node.input) > place and node.input[place] else ()
    moved = {i for i in range(labels.ndim) if before[i] != after[i]}
    moved |= {axis for axis, scale in zip(axes, scales, strict=False) if scale != 1}  # 4 * 1.2 is 4, too
    if stated.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        moved |= set(axes)
    return {node.output[0]: walk.ties.along(labels, sorted(moved))}


def _pad(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Give what is added the labels of the edge: it is zero, or a copy of what is inside."""
    filling = walk.values.get(node.input[2], 0.0) if len(node.input) > 2 and node.input[2] else 0.0
    mode = stated.get("mode", b"constant").decode()
    if mode == "constant" and np.any(filling != 0):
        return None
    before, after = walk.shape(node.input[0]), walk.shape(node.output[0])
    labels = walk.of(node.input[0])
    starts = _starts(walk, node, stated, len(before))
    for axis in range(len(before)):
        unmoved = before[axis] == after[axis] and not starts[axis]
        if unmoved or labels.shape[axis] == 1:
            continue
        if mode != "constant" or not before[axis]:
            labels = walk.ties.along(labels, [axis])
        else:
            place = np.clip(np.arange(after[axis]) - starts[axis], 0, before[axis] - 1)
            labels = labels.take(place, axis)
    return {node.output[0]: labels}


def _starts(walk: Walk, node: NodeProto, stated: dict[str, Any], rank: int) -> np.ndarray:
    """Return how many elements a Pad adds before each axis."""
    pads = np.ravel(walk.values[node.input[1]] if len(node.input) > 1 else stated["pads"])
    axes = np.arange(rank)
    if len(node.input) > 3 and node.input[3]:
        axes = np.ravel(walk.values[node.input[3]]) % rank
    starts = np.zeros(rank, np.int64)
    starts[axes] = pads[: len(axes)]
    return starts


def _sum(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Demand that all operands have the same factors."""
    activations = [name for name in node.input if not walk.is_constant(name) or name in walk.labels]
    if not activations or any(name in walk.constants for name in activations):
        return None
    rank = len(walk.shape(node.output[0]))
    labels = np.zeros([1] * rank, np.int32)
    for i, name in enumerate(activations):
        own = widened(walk.of(name), rank)
        if i:
            walk.ties.tie(labels, own)
        labels = np.broadcast_arrays(labels, own)[0] if i else own
    if any(not walk.follow(name, labels) for name in node.input if name not in activations):
        return None
    return {node.output[0]: labels}


def _where(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    if node.input[0] in walk.labels and walk.labels[node.input[0]].any():
        return None
    chosen = helper.make_node("Sum", node.input[1:], node.output, name=node.name)
    return _sum(walk, chosen, {})


def _product(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Let factors pass one operand of a Mul or Div where the other keeps its values."""
    one, two = node.input
    if node.op_type == "Mul" and walk.is_constant(one):
        one, two = two, one
    if walk.is_constant(one):
        return None
    if walk.is_constant(two):
        return _affine(walk, node, one, two)
    if node.op_type == "Mul" and walk.ties.is_pinned(walk.of(one)):
        one, two = two, one
    if not walk.ties.is_pinned(walk.of(two)):
        return None
    return {node.output[0]: widened(walk.of(one), len(walk.shape(node.output[0])))}


def _affine(walk: Walk, node: NodeProto, source: str, constant: str) -> dict[str, np.ndarray]:
    """Scale what comes out of a product with a constant anew; the constant absorbs the change.

    A divisor absorbs the inverse. A constant of one element passes the factors on as they are.
    """
    shape, sizes = walk.shape(node.output[0]), walk.shape(constant)
    labels = walk.of(source)
    if walk.constants[constant].size == 1 or len(sizes) > labels.ndim or walk.shape(source) != shape:
        wide = walk.constants[constant].size > 1
        labels = walk.ties.along(labels, range(labels.ndim)) if wide else labels
        return {node.output[0]: widened(labels, len(shape))}
    sizes = (1,) * (len(shape) - len(sizes)) + sizes
    before = walk.ties.along(labels, [axis for axis in range(len(shape)) if sizes[axis] == 1])
    after = walk.ties.fresh(sizes)
    own = slice(len(shape) - len(walk.shape(constant)), None)
    up, down = (part.reshape(part.shape[own]) for part in (after, before))
    walk.absorb(constant, *((up, down) if node.op_type == "Mul" else (down, up)))
    return {node.output[0]: after}


def _movement(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Run the operator on the labels of what it moves, and on the values of all else."""
    moved = node.input if node.op_type == "Concat" else node.input[:1]
    before = {name: walk.of(name) for name in moved}
    if not any(labels.any() for labels in before.values()):
        return {}
    given = {name: walk.values[name] for name in node.input if name}
    given |= {name: np.array(full(labels, walk.shape(name))) for name, labels in before.items()}
    inputs, outputs = (
        [helper.make_empty_tensor_value_info(name) for name in names] for names in (given, node.output)
    )
    single = helper.make_model(helper.make_graph([node], "moved", inputs, outputs), opset_imports=walk.opsets)
    results = ReferenceEvaluator(single).run(None, given)
    return {
        name: compact(np.asarray(labels, np.int32)) for name, labels in zip(node.output, results, strict=True)
    }


def _slice(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Let a table from which a size of the data cuts a part have one factor along the axes that are cut."""
    source = node.input[0]
    if source not in walk.constants:
        return _movement(walk, node, stated)
    before, after = walk.shape(source), walk.shape(node.output[0])
    return {node.output[0]: walk.along(source, [i for i in range(len(before)) if before[i] != after[i]])}


def _gather(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Follow an index that is known. One that depends on the data may choose any element along the axis.

    So may one that depends on a size, of a table with places for larger sizes.
    """
    source, index = node.input
    if index in walk.constants or (index in walk.known and source not in walk.constants):
        return _movement(walk, node, stated)
    axis = stated.get("axis", 0) % max(len(walk.shape(source)), 1)
    labels = walk.along(source, [axis])
    places = len(walk.shape(index))
    kept = [*range(axis), *[axis] * places, *range(axis + 1, labels.ndim)]
    return {node.output[0]: labels.reshape([labels.shape[i] if i != axis else 1 for i in kept])}


def _convolution(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    kernel = node.input[1]
    if not walk.is_constant(kernel) or any(name and not walk.is_constant(name) for name in node.input[2:]):
        return None
    sizes, groups = walk.shape(kernel), stated.get("group", 1)
    before = walk.read(node.input[0], 1).reshape(groups, -1)
    spread = (slice(None), slice(None), *[None] * (len(sizes) - 2))
    if node.op_type == "Conv":  # (c_out, c_in / groups, ...)
        after = walk.ties.fresh(sizes[:1])
        walk.absorb(kernel, after[:, None][spread], np.repeat(before, sizes[0] // groups, axis=0)[spread])
    else:  # (c_in, c_out / groups, ...)
        after = walk.ties.fresh((groups * sizes[1],))
        up = np.repeat(after.reshape(groups, -1), sizes[0] // groups, axis=0)
        walk.absorb(kernel, up[spread], before.reshape(-1, 1)[spread])
    if len(node.input) > 2 and node.input[2]:
        walk.absorb(node.input[2], after)
    return walk.write(node.output[0], after, 1)


def _gemm(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    source, kernel, *bias = node.input
    if stated.get("transA") or not walk.is_constant(kernel) or walk.is_constant(source):
        return None
    transposed = bool(stated.get("transB"))
    before = walk.read(source, 1)
    after = walk.ties.fresh((walk.shape(kernel)[0 if transposed else 1],))
    up, down = after[None, :], before[:, None]
    walk.absorb(kernel, *((up.T, down.T) if transposed else (up, down)))
    written = walk.write(node.output[0], after, 1)
    if bias and bias[0] and not walk.follow(bias[0], written[node.output[0]]):
        return None
    return written


def _matmul(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    source, kernel = node.input
    if walk.is_constant(kernel) and len(walk.shape(kernel)) == 2 and not walk.is_constant(source):
        before = walk.read(source, -1)
        after = walk.ties.fresh(walk.shape(kernel)[1:])
        walk.absorb(kernel, after[None, :], before[:, None])
        return walk.write(node.output[0], after, len(walk.shape(node.output[0])) - 1)
    return _activations_product(walk, node)


def _activations_product(walk: Walk, node: NodeProto) -> dict[str, np.ndarray] | None:
    """Let factors pass one operand of a product of activations where the other keeps its values.

    In attention these are the channels of the values, which the probabilities add up over the positions.
    """
    if any(name in walk.constants or len(walk.shape(name)) < 2 for name in node.input):
        return None
    left, right = (walk.of(name) for name in node.input)
    rank = len(walk.shape(node.output[0]))
    if walk.ties.is_pinned(left):
        labels = walk.ties.along(right, [right.ndim - 2])
    elif walk.ties.is_pinned(right):
        labels = walk.ties.along(left, [left.ndim - 1])
    else:
        return None
    return {node.output[0]: widened(labels, rank)}


def _recurrent(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Let the kernel of a recurrent cell undo the factors of what the cell reads."""
    source, kernel, *others = node.input
    if not walk.is_constant(kernel):
        return None
    for name in others:
        walk.pin(name, f"{node.op_type} {node.name!r} reads it")
    before = walk.read(source, -1)
    walk.absorb(kernel, np.zeros((1, 1, 1), np.int32), before[None, None, :])
    return {}


def _batch_norm(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    source, scale, bias, mean, variance = node.input
    if not all(map(walk.is_constant, (scale, bias, mean, variance))) or stated.get("training_mode"):
        return None
    before = walk.read(source, 1)
    after = walk.ties.fresh(before.shape)
    walk.absorb(scale, after, before)
    walk.absorb(mean, before)
    walk.absorb(bias, after)
    return walk.write(node.output[0], after, 1)


def _normalization(walk: Walk, node: NodeProto, stated: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Scale what a normalization puts out, by its own scale and bias. What it reads keeps its values."""
    source, scale, *bias = node.input
    shape, sizes = walk.shape(source), walk.shape(scale)
    by_channel = node.op_type in ("GroupNormalization", "InstanceNormalization")
    if not all(walk.is_constant(name) and walk.shape(name) == sizes for name in (scale, *bias) if name):
        return None
    if by_channel and sizes != shape[1:2]:
        return None
    walk.pin(source, f"{node.op_type} {node.name!r} reads it")
    after = walk.ties.fresh(sizes)
    for name in (scale, *bias):
        if name:
            walk.absorb(name, after)
    if by_channel:
        return walk.write(node.output[0], after, 1)
    walk.channels[node.output[0]] = after.ravel()
    return {node.output[0]: after.reshape((1,) * (len(shape) - len(sizes)) + sizes)}


_RULES: dict[str, Rule] = {
    **dict.fromkeys(PASSING, _passing),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys(MOVEMENTS, _movement),
    **dict.fromkeys(SHAPE_ONLY, _shape_only),
    **dict.fromkeys(RECURRENT, _recurrent),
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("Div", "Mul"), _product),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "LayerNormalization"), _normalization),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "RMSNormalization": _normalization,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "PRelu": _prelu,
    "Pad": _pad,
    "Slice": _slice,
    "Where": _where,
}
