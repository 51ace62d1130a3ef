"""Bring batch norm to a layer that it folds into, past the operators with which it commutes.

An affine operator computes gain * x + shift with constants: a BatchNormalization, or an Add, Sub, Mul or Div
by a constant. `move_to_layers` moves it towards the inputs until it stands behind a layer, into which
`folding` folds it. `fold_into_next` folds one that has no layer before it into the layer behind it.
`activate_before_pools` puts an activation directly behind its layer.

The module imports numpy, onnx and modules of qt_jax that need no more, as `graph` explains.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.naming import FOLDED_INPUTS
from qt_jax.export.operators import BIASED

SCALING = frozenset({"BatchNormalization", "Div", "Mul"})
"""Affine operators that have a gain."""

SHIFTING = frozenset({"Add", "BatchNormalization", "Sub"})
"""Affine operators that have a shift."""

AFFINE = SCALING | SHIFTING

POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})

MAXIMA = frozenset({"GlobalMaxPool", "MaxPool", "ReduceMax"})

REDUCTIONS = frozenset({"ReduceMax", "ReduceMean"})

RESHAPING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output holds the numbers of their input in the same order."""

Spread = dict[str, np.ndarray]
"""Maps each constant of an affine operator to its numbers along the axes of the tensor that it works on. An
array has size 1 along the axes on which its numbers do not depend."""


def move_to_layers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Move each affine operator that can reach a layer past what lies between.

    It passes operators whose output nothing else reads, as long as no constant of it varies within a window:

    - averages and interpolations, whose weights sum to 1. Where an average counts padding as zeros, a shift
      does not pass.
    - maxima, if every gain is positive: max(gain x + shift) = gain max(x) + shift for gain > 0.
    - a Reshape or a Transpose, which its constants follow.
    - a product of two tensors, if it multiplies by one number, as attention scales its scores.

    Into a Conv, ConvTranspose or Gemm `folding` folds it. Into a MatMul and the Add behind that it is folded
    here. One that reaches no layer with a constant kernel, or that has several numbers for one feature of
    the layer, stays where it is.
    """
    mover = _Mover(model)
    for place, node in enumerate(model.graph.node):
        if node.op_type in AFFINE:
            mover.move(place)
    return _join_transposes(graph.rebuild(model, mover.nodes, mover.values))


class _Mover:
    """Hold the graph while affine operators move.

    A place in the list of nodes keeps the tensor that it writes, while the operators change places.

    Attributes:
      nodes: Nodes in topological order.
      values: Constants; those of moved operators are added.
      shapes: Shapes of the tensors.
      read: How often each tensor is read.
      places: Maps a tensor to the place that writes it.
      settled: Maps the output of an affine operator that stands on a layer, or on others that do, to the
        output of that layer.
    """

    def __init__(self, model: onnx.ModelProto):
        self.nodes = list(model.graph.node)
        self.values = graph.constants(model)
        self.shapes = graph.shapes(model)
        self.read = graph.uses(model)
        self.places = {name: place for place, node in enumerate(self.nodes) for name in node.output}
        self.settled: dict[str, str] = {}

    def move(self, place: int) -> None:
        """Move the affine operator at `place` to the layer that it can reach, if there is one."""
        node = self.nodes[place]
        spread = spread_constants(node, self.values, self.shapes)
        source = _data(node, self.values)
        places = [place]
        layer = None
        while spread is not None and (layer := self._layer(source, node)) is None:
            before = self._writer(source)
            if before is None:
                return
            spread = past(before, node.op_type, spread, self.values, self.shapes)
            places.insert(0, self.places[source])
            source = before.input[0]
        axis = -1 if layer is not None and layer.op_type == "MatMul" else 1
        if layer is None or spread is None or not _is_by_feature(spread, axis % len(self.shapes[source])):
            return
        if layer.op_type != "MatMul":
            first = self._moved(node, spread, source)
        elif len(places) > 1 or source in self.settled or node.op_type != "Add":
            first = self._folded(node, spread, source, layer)
        else:
            first = node  # the bias of the MatMul
        self._rotate(places, source, first)
        if self.nodes[places[0]].op_type in AFFINE:
            self.settled[self.nodes[places[0]].output[0]] = layer.output[0]

    def _writer(self, name: str) -> NodeProto | None:
        """Return the node that writes a tensor with one reader; None for any other tensor."""
        return self.nodes[self.places[name]] if name in self.places and self.read[name] == 1 else None

    def _layer(self, name: str, reader: NodeProto) -> NodeProto | None:
        """Return the layer into which an affine operator that reads `name` folds, if one is reached.

        Other affine operators may stand on the layer already. `folding` folds batch norm first, so that it
        can stand on batch norm only.
        """
        node = self._writer(name)
        if node is not None and name in self.settled:
            layer = self.nodes[self.places[self.settled[name]]]
            last = reader.op_type == "BatchNormalization" and node.op_type != "BatchNormalization"
            return None if last and layer.op_type != "MatMul" else layer
        if node is None or not (node.op_type in BIASED or _multiplies_alone(node, self.read)):
            return None
        fixed = self.values.keys() >= {*node.input[1:]} and self.values[node.input[1]].ndim > 1
        return node if fixed else None

    def _moved(self, node: NodeProto, spread: Spread, source: str) -> NodeProto:
        """Make the affine operator that works on `source`, with the constants of `spread`."""
        if source in node.input:
            return node
        names = {}
        for name, value in spread.items():
            if node.op_type == "BatchNormalization":
                value = np.broadcast_to(value.ravel(), self.shapes[source][1:2])
            names[name] = self.values.derive(name, f"before {node.output[0]}", value)
        return graph.rewired(node, [names.get(name, source) for name in node.input])

    def _folded(self, node: NodeProto, spread: Spread, source: str, product: NodeProto) -> NodeProto:
        """Fold an affine operator on `source` into a MatMul and, where that has a bias, into its Add.

        Returns:
          What takes the operator's place: the Add of a bias where there was none, else an Identity.
        """
        gain, shift = (array.ravel() for array in gain_and_shift(node, spread))
        kernel, output = product.input[1], node.output[0]
        if node.op_type in SCALING:
            gain = np.broadcast_to(gain, self.values[kernel].shape[-1:])
            scaled = self.values.derive(kernel, output, _single(self.values[kernel] * gain), gain)
            place = self.places[product.output[0]]
            self.nodes[place] = graph.rewired(product, [product.input[0], scaled])
        if source in self.settled:
            place = self.places[source]
            addition = self.nodes[place]
            bias = next(name for name in addition.input if name in self.values)
            total = self.values.derive(bias, output, _single(self.values[bias] * gain + shift))
            self.nodes[place] = graph.rewired(addition, [product.output[0], total])
        elif node.op_type in SHIFTING:
            constants = [name for name in node.input if name in spread]
            bias = self.values.derive(constants[-1], output, _single(shift))
            return helper.make_node("Add", [source, bias], [output])
        return helper.make_node("Identity", [source], [output])

    def _rotate(self, places: Sequence[int], source: str, first: NodeProto) -> None:
        """Write `first`, which reads `source`, to the first place, and what it has passed one place later."""
        operators = [first, *(self.nodes[place] for place in places[:-1])]
        outputs = [self.nodes[place].output[0] for place in places]
        shapes = [self.shapes[source], *(self.shapes[name] for name in outputs[:-1])]
        for i, (place, node) in enumerate(zip(places, operators, strict=True)):
            inputs = [outputs[i - 1], *node.input[1:]] if i else node.input
            self.nodes[place] = graph.rewired(node, inputs, [outputs[i]])
        self.shapes.update(zip(outputs, shapes, strict=True))


def _multiplies_alone(node: NodeProto, read: Mapping[str, int]) -> bool:
    """Tell whether a node is a MatMul whose kernel no other node reads: folding would copy it."""
    return node.op_type == "MatMul" and read.get(node.input[1], 0) <= 1


def spread_constants(node: NodeProto, values: Constants, shapes: Shapes) -> Spread | None:
    """Return the constants of an affine operator along the axes of the tensor that it works on.

    Returns:
      None for a node that is none: its constants are not known, it divides by or subtracts the tensor, or the
      tensor is broadcast.
    """
    if node.op_type not in AFFINE:
        return None
    source = _data(node, values)
    shape = shapes.get(source, ())
    constants = [name for name in node.input if name != source]
    reversed_ = node.op_type in ("Div", "Sub") and node.input[0] != source
    known = values.keys() >= {*constants} and shapes.get(node.output[0]) == shape
    if not source or not shape or reversed_ or not known or len(node.output) > 1:
        return None
    trailing = len(shape) - 2 if node.op_type == "BatchNormalization" else 0
    full = {}
    for name in constants:
        value = values[name].reshape((*values[name].shape, *(1,) * trailing))
        if value.dtype != np.float32 or value.ndim > len(shape):
            return None
        full[name] = _without_repeats(value.reshape((1,) * (len(shape) - value.ndim) + value.shape))
    return full


def _data(node: NodeProto, values: Constants) -> str:
    """Return the one tensor among the inputs of an affine operator; "" where there are two or none."""
    tensors = [name for name in node.input if name not in values]
    return tensors[0] if len(tensors) == 1 else ""


def _without_repeats(value: np.ndarray) -> np.ndarray:
    """Cut each axis along which the numbers are equal to size 1."""
    for axis in range(value.ndim):
        first = value.take([0], axis)
        value = first if np.array_equal(np.broadcast_to(first, value.shape), value) else value
    return value


def _is_by_feature(spread: Spread, axis: int) -> bool:
    """Tell whether the constants vary along no axis but `axis`."""
    return all(
        size == 1 for value in spread.values() for other, size in enumerate(value.shape) if other != axis
    )


def gain_and_shift(node: NodeProto, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Return gain and shift of an affine operator in float64, with its constants taken from `spread`.

    Those of a BatchNormalization are gain = scale / sqrt(variance + epsilon) and shift = bias - mean * gain
    (Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 2).
    """
    first, *others = (spread[name].astype(np.float64) for name in node.input if name in spread)
    one, zero = np.ones(()), np.zeros(())
    match node.op_type:
        case "Add":
            return one, first
        case "Sub":
            return one, -first
        case "Mul":
            return first, zero
        case "Div":
            return 1.0 / first, zero
    bias, mean, variance = others
    gain = first / np.sqrt(variance + graph.attributes(node).get("epsilon", 1e-5))
    return gain, bias - mean * gain


def _single(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32)


def past(
    before: NodeProto, operator: str, spread: Spread, values: Constants, shapes: Shapes
) -> Spread | None:
    """Return the constants with which an affine operator does before `before` what it did behind it.

    Args:
      before: Writes the tensor on which the operator works.
      operator: Type of the affine operator.
      spread: Its constants behind `before`.
      values: Constants of the graph.
      shapes: Shapes of its tensors.

    Returns:
      The constants along the axes of the first input of `before`. None where the two do not commute.
    """
    source, result = (shapes.get(name, ()) for name in (before.input[0], before.output[0]))
    if len(before.output) > 1 or not all((*source, *result)):
        return None
    if before.op_type == "MatMul" and operator not in ("Div", "Mul"):
        return None
    if before.op_type in MAXIMA and operator in SCALING and np.any(next(iter(spread.values())) <= 0):
        return None
    if before.op_type == "AveragePool" and operator in SHIFTING and _counts_padding(before):
        return None
    moved = {name: _before(before, value, source, result, values) for name, value in spread.items()}
    known = {name: value for name, value in moved.items() if value is not None}
    return known if len(known) == len(spread) else None


def _counts_padding(pool: NodeProto) -> bool:
    """Tell whether an average may count zeros beside the image."""
    stated = graph.attributes(pool)
    padded = any(stated.get("pads", ())) or stated.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return bool(stated.get("count_include_pad")) and (padded or bool(stated.get("ceil_mode")))


def _before(
    node: NodeProto, value: np.ndarray, source: Sequence[int], result: Sequence[int], values: Constants
) -> np.ndarray | None:
    """Return numbers along the output of `node`, of shape `result`, along its input, of shape `source`.

    Returns:
      None where one element of the output has several numbers in the input, or for an unknown operator.
    """
    stated = graph.attributes(node)
    if node.op_type == "MatMul":
        return value.reshape((1,) * len(source)) if value.size == 1 else None
    if node.op_type in POOLS or (node.op_type == "Resize" and source[:2] == result[:2]):
        return value if all(size == 1 for size in value.shape[2:]) else None
    if node.op_type in REDUCTIONS and len(node.input) > 1 and node.input[1] in values:
        axes = tuple(values[node.input[1]].ravel().tolist())
        return value if stated.get("keepdims", 1) else np.expand_dims(value, axes)
    if node.op_type == "Transpose":
        return value.transpose(np.argsort(stated["perm"]))
    return _without_repeats(_reshaped(value, result, source)) if node.op_type in RESHAPING else None


def _reshaped(value: np.ndarray, shape: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Reshape numbers along a tensor of `shape` as the tensor is reshaped to `target`.

    They are repeated only within the axes that are merged or split together, where they vary on one of these.
    """
    full: list[int] = []
    reshaped: list[int] = []
    for old, new in _groups(shape, target):
        varies = any(size > 1 for size in value.shape[old])
        full += shape[old] if varies else value.shape[old]
        reshaped += target[new] if varies else [1] * len(target[new])
    return np.broadcast_to(value, full).reshape(reshaped)


def _groups(shape: Sequence[int], target: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the smallest runs of axes of `shape` that hold as many elements as runs of axes of `target`.

    >>> [(old.stop, new.stop) for old, new in _groups((2, 12, 5), (2, 3, 4, 5))]
    [(1, 1), (2, 3), (3, 4)]
    """
    old = new = 0
    while old < len(shape) or new < len(target):
        starts = old, new
        old, new = min(old + 1, len(shape)), min(new + 1, len(target))
        while (left := math.prod(shape[starts[0] : old])) != (right := math.prod(target[starts[1] : new])):
            old, new = old + (left < right), new + (left > right)
        yield slice(starts[0], old), slice(starts[1], new)


def _join_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Join each Transpose with the one before it, between which an affine operator may have stood."""
    written: dict[str, NodeProto] = {}  # maps the output of a Transpose, and what equals it, to the Transpose
    nodes = []
    for node in model.graph.node:
        before = written.get(node.input[0]) if node.op_type == "Transpose" else None
        if before is not None:
            inner, outer = (graph.attributes(each)["perm"] for each in (before, node))
            perm = [inner[axis] for axis in outer]
            node = helper.make_node("Transpose", before.input, node.output, perm=perm)
            if perm == sorted(perm):
                node = helper.make_node("Identity", before.input, node.output)
        if node.op_type == "Transpose":
            written[node.output[0]] = node
        elif node.op_type == "Identity" and node.input[0] in written:
            written[node.output[0]] = written[node.input[0]]
        nodes.append(node)
    return graph.rebuild(model, nodes, graph.constants(model))


def activate_before_pools(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let a Relu or Clip behind a MaxPool follow the layer before that, as compilers compute it.

    A function f that never falls commutes with the maximum: f(max(x)) = max(f(x)). Integer kernels of a layer
    write what its activation returns. With the pool between, the layer would be rounded once more, on a grid
    that holds what the activation cuts off.
    """
    values, read = graph.constants(model), graph.uses(model)
    nodes = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        pool = nodes.get(node.input[0]) if node.op_type in ("Clip", "Relu") else None
        if pool is None or pool.op_type != "MaxPool" or len(pool.output) > 1:
            continue
        source, pooled = pool.input[0], pool.output[0]
        layer = nodes.get(source)
        if layer is not None and layer.op_type in BIASED and read[source] == read[pooled] == 1:
            nodes[pooled] = graph.rewired(node, [source, *node.input[1:]], [pooled])
            nodes[node.output[0]] = graph.rewired(pool, [pooled], node.output)
    return graph.rebuild(model, nodes.values(), values)


def fold_into_next(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold each affine operator into the Conv without padding, or the Gemm, that alone reads it.

    For y = W (gain x + shift) + b it is W' = W * gain along the inputs, and b' = b + W shift, computed in
    float64. A padded layer would have to pad with -shift / gain in place of 0.

    The layer then reads another tensor, to which a learned range of its input does not apply. Do not use the
    pass on a network that has such ranges. The kernels of such layers are listed in the model's metadata.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    read = graph.uses(model)
    nodes: dict[str, NodeProto] = {}
    changed: set[str] = set()
    for node in model.graph.node:
        while node.input and node.input[0] in nodes and read[node.input[0]] == 1:
            folded = _into_reader(nodes[node.input[0]], node, values, shapes)
            if folded is None:
                break
            node = folded
            changed.add(values.origins.get(node.input[1], ""))
        nodes[node.output[0]] = node
    result = graph.rebuild(model, nodes.values(), values)
    if changed:
        result.metadata_props.add(key=FOLDED_INPUTS, value=json.dumps(sorted(changed - {""})))
    return result


def _into_reader(node: NodeProto, layer: NodeProto, values: Constants, shapes: Shapes) -> NodeProto | None:
    """Write an affine operator and the layer that reads it as one layer, or return None."""
    spread = spread_constants(node, values, shapes)
    if spread is None or not _is_plain(layer) or not values.keys() >= {*layer.input[1:]}:
        return None
    if not _is_by_feature(spread, 1):
        return None
    channels = shapes[node.output[0]][1:2]
    gain, shift = (np.broadcast_to(array.ravel(), channels) for array in gain_and_shift(node, spread))
    kernel, *bias = layer.input[1:]
    stated = graph.attributes(layer)
    transposed = layer.op_type == "Gemm" and not stated.get("transB")
    outputs_first = values[kernel].T if transposed else values[kernel]
    groups = stated.get("group", 1)
    grouped = outputs_first.reshape(groups, -1, *outputs_first.shape[1:])
    by_input = groups, 1, -1, *[1] * (outputs_first.ndim - 2)
    scaled = _single(grouped * gain.reshape(by_input)).reshape(outputs_first.shape)
    added = np.sum(grouped * shift.reshape(by_input), axis=tuple(range(2, grouped.ndim))).ravel()
    origin = values.origins.get(kernel, "")
    output = layer.output[0]
    inputs = [_data(node, values), f"{kernel}#{node.output[0]} {output}"]
    values.add(inputs[1], scaled.T if transposed else scaled, origin)  # its leaf has no gain per output
    if bias or node.op_type in SHIFTING:
        module = origin.rpartition("/")[0]
        leaf = values.origins.get(bias[0], "") if bias else module and f"{module}/bias"
        total = added + sum(values[name].astype(np.float64) for name in bias)
        inputs.append(values.add(f"{output}#bias {node.output[0]}", _single(total), leaf))
    return graph.rewired(layer, inputs)


def _is_plain(layer: NodeProto) -> bool:
    """Tell whether a node is a Conv without padding, or a Gemm of its input as it is."""
    stated = graph.attributes(layer)
    if layer.op_type == "Conv":
        return not any(stated.get("pads", ())) and stated.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    factors = {stated.get("alpha", 1.0), stated.get("beta", 1.0)}
    return layer.op_type == "Gemm" and factors == {1.0} and not stated.get("transA")
