"""Insert standard QuantizeLinear / DequantizeLinear pairs, on the grids of a graph's `Ranges`.

A compiler makes a convolution an integer kernel when its input, kernel and output are quantized. What lies
between two of them must be quantized on both sides too, or it is an island of floating point.
`quantized_tensors` finds the tensors that need a pair; `insert_qdq` writes the graph.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import Encoding, Ranges
from qt_jax.export.naming import KERNELS, free_name
from qt_jax.export.operators import BIASED, WEIGHTED
from qt_jax.export.storage import model_sha256

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})

ABSORBED = frozenset({"Clip", "Relu"})
"""Operators that the operator before them computes, whose own output is then not quantized."""

SELECTING = frozenset({"Expand", "Gather", "Pad", "Slice", "Split"})
"""Operators that select, repeat or pad numbers. They work on integers only behind an operator that does."""

SAME_GRID = SELECTING | frozenset(
    {"Flatten", "MaxPool", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that move, select or interpolate numbers: their output is on the grid of their input."""

MERGING = frozenset({"Add", "Concat", "Mul"})
"""Operators of which every input is an activation; of the others in `BETWEEN` only the first is."""

BETWEEN = SAME_GRID | ABSORBED | MERGING | {"AveragePool", "GlobalAveragePool"}
"""Operators between layers that have integer kernels."""

CARRIED = frozenset({"Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators past which onnxruntime carries a pair itself. From opset 21 on it states the type of the integers
there, and fails when it then turns INT8 into UINT8, which it does on x86 by default."""

STATES_TYPE = 21
"""First opset of QuantizeLinear with a stated type."""

FIRST_OPSET = {4: 21, 8: 13, 16: 21}
"""Maps a width to the first opset of QuantizeLinear and DequantizeLinear on such integers, with an axis."""

SIGNED = {4: ml_dtypes.int4, 8: np.int8, 16: np.int16}

UNSIGNED = {8: np.uint8, 16: np.uint16}


def insert_qdq(
    model: onnx.ModelProto, ranges: Ranges, *, signed: bool = False, learned_only: bool = False
) -> onnx.ModelProto:
    """Put the quantized layers of `model` on integers, as `ranges` says, using only operators of ai.onnx.

    Kernels are stored as integers behind DequantizeLinear, and biases as INT32 at input scale * kernel
    scale. An activation has one pair, `<tensor>/QuantizeLinear` and `<tensor>/DequantizeLinear`, for all its
    readers. `quantized_tensors` says which activations have one. If others read the tensor too, its grid
    may differ from the one that a layer has learned. Such a layer requantizes: a second pair follows the
    first on that layer's branch.

    Args:
      model: Graph from `to_onnx`.
      ranges: Ranges from `tensor_ranges` on this very graph.
      signed: Whether activations are INT8 and INT16 in place of UINT8 and UINT16. These are the same numbers
        with shifted zero-points. Compilers accept one, the other, or both. onnxruntime on x86 makes integer
        kernels of the unsigned ones by default, and of the signed ones with its session option
        "session.qdqisint8allowed".
      learned_only: Whether to insert pairs only at layer inputs, as the JAX forward at lambda = 1 computes.
        Few convolutions then run as integer kernels.

    Returns:
      A graph of the same inputs, outputs and opset, with shapes inferred again. Symmetric activations clip at
      the ends of their type, [-128, 127], where training's narrow range has [-127, 127].

    Raises:
      InvalidInput: `ranges` is of another graph or lacks a tensor, the opset lacks an integer type (INT4
        and INT16 need 21), or a batch of matrices has a scale for each channel.

    >>> import flax.linen as nn, jax
    >>> import qt_jax as qt
    >>> from qt_jax.export import to_onnx
    >>> from qt_jax.export.ranges import tensor_ranges
    >>> net, images = nn.Conv(4, (3, 3), padding=1), jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    >>> variables = qt.attach_statistics(net, net.init(jax.random.key(1), images), qt.QuantConfig(), images)
    >>> with qt.quant_trim(qt.QuantConfig(), 0.0, train=True):
    ...     _, seen = net.apply(variables, images, mutable=["batch_stats"])
    >>> model = to_onnx(net.apply, variables, (6, 6, 3), output_names=("features",))
    >>> calibration = np.asarray(images).transpose(0, 3, 1, 2)
    >>> ranges = tensor_ranges(model, variables | seen, qt.QuantConfig(), calibration)
    >>> quantized = insert_qdq(model, ranges)
    >>> [node.name for node in quantized.graph.node]  # doctest: +NORMALIZE_WHITESPACE
    ['input/QuantizeLinear', 'input/DequantizeLinear', 'kernel/DequantizeLinear', 'bias/DequantizeLinear',
     'Conv', 'features/QuantizeLinear', 'features/DequantizeLinear']
    """
    if ranges.model_sha256 != model_sha256(model):
        raise InvalidInput("these ranges are of another graph: compute them again with tensor_ranges")
    wanted = set()
    if not learned_only:
        wanted = quantized_tensors(model, ranges.inputs.keys() & ranges.kernels.keys())
    missing = (wanted | set(ranges.kernels.values())) - ranges.tensors.keys()
    if missing:
        raise InvalidInput(f"these ranges lack {', '.join(sorted(missing)[:8])}")
    outputs = wanted.intersection(output.name for output in model.graph.output)
    opset = model.opset_import[0].version
    if signed and opset >= STATES_TYPE:
        carried = _carried(model, wanted, ranges)
        wanted |= carried.keys()
        outputs |= carried.keys() & {output.name for output in model.graph.output}
        ranges = dataclasses.replace(ranges, tensors={**ranges.tensors, **carried})
    writer = _Writer(graph.constants(model), ranges, wanted, outputs, signed, opset)
    for node in model.graph.node:
        writer.add(node)
    quantized = graph.rebuild(model, writer.nodes, writer.values)
    kept = [entry for entry in model.metadata_props if entry.key != KERNELS]  # kernels are integers now
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(kept)
    return graph.with_shapes(quantized)


def _carried(model: onnx.ModelProto, wanted: Collection[str], ranges: Ranges) -> dict[str, Encoding]:
    """Return the grid of each tensor that `CARRIED` makes of one with a pair, and that has none of its own.

    A second pair on the same grid changes no number.
    """
    found: dict[str, Encoding] = {}
    for node in model.graph.node:
        source = node.input[0] if node.op_type in CARRIED else ""
        if (source in wanted or source in found) and node.output[0] not in wanted:
            found[node.output[0]] = found.get(source) or ranges.tensors[source]
    return found


def storage_bits(bits: int) -> int:
    """Return the width of the narrowest integer type of ONNX that holds `bits` bits.

    >>> [storage_bits(bits) for bits in (3, 4, 6, 8, 9)]
    [4, 4, 8, 8, 16]
    """
    return next(width for width in SIGNED if bits <= width)


def quantized_tensors(model: onnx.ModelProto, layers: Collection[str]) -> set[str]:
    """Find the tensors that get a Q/DQ pair, besides the inputs of the layers themselves.

    They are the output of each quantized convolution, and the inputs and outputs of operators of `BETWEEN`
    that lead to quantized layers only. Where only a Relu or Clip reads a tensor, the pair stands behind that
    instead. An operator stays float where it also leads to one without an integer kernel
    (LayerNormalization, Softmax, Gelu) or to the end of the graph, or where it merges an activation with a
    constant. One of `SELECTING` stays float behind a float operator too, and one of `MERGING` behind float
    operators alone, such as the gates of a recurrent cell. A linear layer's output is quantized
    only where an operator of `BETWEEN` reads it, because logits on eight bits tie.

    Args:
      model: Graph with named nodes.
      layers: Names of the nodes whose input and kernel are quantized.

    >>> nodes = [
    ...     onnx.helper.make_node("Conv", ["x", "w"], ["conv"], name="conv"),
    ...     onnx.helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
    ... ]
    >>> model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    >>> quantized_tensors(model, {"conv"})
    {'relu'}
    """
    outputs = {output.name for output in model.graph.output}
    readers = graph.readers(model)
    integer = set(layers) | _integer_between(model, layers, readers)

    def settled(name: str) -> str:
        """Return the tensor itself, or the output of the Relu or Clip that is its only reader."""
        alone = readers[name][0] if len(readers[name]) == 1 and name not in outputs else None
        return alone.output[0] if alone is not None and alone.op_type in ABSORBED else name

    convolutions = CONVOLUTIONS | BETWEEN
    makers = {node.output[0]: node for node in model.graph.node}
    found: set[str] = set()
    for node in model.graph.node:
        if node.name not in integer:
            continue
        if node.op_type in convolutions:
            found.update(map(settled, node.output))
        if node.op_type in BETWEEN:
            computed = {name for name in node.input if name in makers and makers[name].name in integer}
            found.update(
                name for name in activation_inputs(node) if name not in computed or settled(name) == name
            )
    return found


def activation_inputs(node: NodeProto) -> list[str]:
    """Return the inputs of an operator of `BETWEEN` that are activations."""
    return list(node.input) if node.op_type in MERGING else list(node.input[:1])


def _integer_between(
    model: onnx.ModelProto, layers: Collection[str], readers: Mapping[str, list[NodeProto]]
) -> set[str]:
    """Return the names of the nodes of `BETWEEN` that work on integers."""
    values = graph.constants(model)
    outputs = {output.name for output in model.graph.output}
    found: set[str] = set()
    for node in reversed(model.graph.node):
        following = [reader.name for name in node.output for reader in readers[name]]
        leads_on = following and all(name in layers or name in found for name in following)
        constant = not values.keys().isdisjoint(activation_inputs(node))
        padded = node.op_type == "Pad" and node.input[2:3] and np.any(values.get(node.input[2], 0.0))
        inside = leads_on and outputs.isdisjoint(node.output)
        if node.op_type in BETWEEN and inside and not constant and not padded:
            found.add(node.name)
    makers = {name: node.name for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        behind = [makers.get(name) for name in activation_inputs(node)]
        first = node.op_type in SELECTING and behind[0] not in found | set(layers)
        alone = node.op_type in MERGING and None not in behind and found.isdisjoint(behind)
        if first or (alone and set(layers).isdisjoint(behind)):
            found.discard(node.name)
    return found


def interpolates(node: NodeProto) -> bool:
    """Tell whether an operator of `SAME_GRID` makes numbers that lie between those it reads.

    Clipping such numbers is not the same as clipping what they are made of.
    """
    return node.op_type == "Resize" and graph.attributes(node).get("mode", b"nearest") != b"nearest"


def same_grid_groups(model: onnx.ModelProto, tensors: Collection[str]) -> list[list[str]]:
    """Group `tensors` by shared grid.

    A group is one tensor and what operators of `SAME_GRID` make of it, joined again by Concat or not.
    """
    groups = {name: [name] for name in tensors}
    for node in model.graph.node:
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        joined = [groups.get(name) for name in sources]
        moves = node.op_type in SAME_GRID or node.op_type == "Concat"
        if moves and joined[0] is not None and all(group is joined[0] for group in joined):
            for output in groups.keys() & set(node.output):
                joined[0].append(output)
                groups[output] = joined[0]
    return list({id(group): group for group in groups.values()}.values())


@dataclasses.dataclass
class _Writer:
    """Write the quantized graph node by node.

    Attributes:
      values: Constants by name; those of the pairs are added.
      ranges: The grids.
      wanted: Tensors that have a pair for all readers.
      outputs: Those of `wanted` that leave the graph.
      signed: Whether activations have signed types.
      opset: Opset of the graph.
      nodes: The nodes so far, in order.
      written: Maps a (tensor, grid) to the tensor that stands for it already.
      bases: Names that are taken.
    """

    values: dict[str, np.ndarray]
    ranges: Ranges
    wanted: set[str]
    outputs: set[str]
    signed: bool
    opset: int
    nodes: list[NodeProto] = dataclasses.field(default_factory=list)
    written: dict[tuple, str] = dataclasses.field(default_factory=dict)
    bases: set[str] = dataclasses.field(default_factory=set)

    def add(self, node: NodeProto) -> None:
        """Write `node`, with the pairs of what it reads before it and of what leaves the graph behind it."""
        learned = self.ranges.inputs.get(node.name)
        skipped = learned is None and node.name not in self.ranges.kernels and node.op_type in WEIGHTED
        if skipped and node.input[1] in self.values:  # behind a DequantizeLinear its kernel is rounded too
            inputs = list(node.input)
        else:
            inputs = [
                self._activation(name, None if index else learned) for index, name in enumerate(node.input)
            ]
        if node.name in self.ranges.kernels:
            kernel = self.ranges.tensors[node.input[1]]
            self._require_one_scale(node, kernel)
            integers = kernel.integers(self.values[node.input[1]])
            inputs[1] = self._constant(node.input[1], integers, kernel.bits, kernel.scale, kernel.axis)
            if (
                learned is not None
                and node.op_type in BIASED
                and node.input[2:]
                and node.input[2] in self.values
            ):
                inputs[2] = self._bias(
                    node.input[2],
                    np.asarray(learned.scale, np.float32) * np.asarray(kernel.scale, np.float32),
                )
        made = [f"{name}/float" if name in self.outputs else name for name in node.output]
        self.nodes.append(graph.rewired(node, inputs, made))
        for name in self.outputs.intersection(node.output):
            encoding = self.ranges.tensors[name]
            self.written[name, encoding.grid] = self._pair(f"{name}/float", self._base(name), encoding, name)

    def _activation(self, name: str, learned: Encoding | None) -> str:
        """Return the tensor to read in place of `name`; `learned` is the grid of a layer's input."""
        source = name
        if name in self.wanted:
            source = self._shared(name, name, self.ranges.tensors[name])
            if learned is not None and learned.grid == self.ranges.tensors[name].grid:
                return source
        return source if learned is None else self._shared(source, name, learned)

    def _shared(self, source: str, name: str, encoding: Encoding) -> str:
        """Return `source` behind a pair named after the tensor `name`, which is shared by its readers."""
        key = source, encoding.grid
        if key not in self.written:
            base = self._base(name)
            self.written[key] = self._pair(source, base, encoding, f"{base}/DequantizeLinear")
        return self.written[key]

    def _pair(self, source: str, base: str, encoding: Encoding, output: str) -> str:
        """Write the pair on that grid, named after `base`; return its output."""
        self._require_opset(encoding.bits, base)
        shift, types = (0, SIGNED) if self.signed else (2 ** (encoding.bits - 1), UNSIGNED)
        zero_point = np.array(encoding.zero_point[0] + shift, types[encoding.bits])
        quantized = f"{base}/QuantizeLinear"
        grid = f"{quantized}/scale", f"{quantized}/zero_point"  # a norm has a "scale" of its own
        self.values |= dict(zip(grid, (np.asarray(encoding.scale[0], np.float32), zero_point), strict=True))
        self._node("QuantizeLinear", quantized, [source, *grid], quantized)
        return self._node("DequantizeLinear", f"{base}/DequantizeLinear", [quantized, *grid], output)

    def _bias(self, name: str, scale: np.ndarray) -> str:
        """Write a bias on 32 bits at the scale of the products it is added to, `(1,)` or `(channels,)`."""
        integers = np.rint(self.values[name].astype(np.float64) / scale.astype(np.float64))
        return self._constant(name, integers, 32, tuple(scale.tolist()), 0 if len(scale) > 1 else None)

    def _constant(
        self, name: str, integers: np.ndarray, bits: int, scale: tuple[float, ...], axis: int | None
    ) -> str:
        """Write integers behind DequantizeLinear, with zero-points 0."""
        key = name, scale
        if key not in self.written:
            base = self._base(name)
            dtype = np.int32 if bits == 32 else SIGNED[storage_bits(bits)]
            if bits != 32:
                self._require_opset(bits, name)
            stored = np.asarray(scale[0] if axis is None else scale, np.float32)
            dequantized = f"{base}/DequantizeLinear"
            named = f"{base}/quantized", f"{dequantized}/scale", f"{dequantized}/zero_point"
            parts = integers.astype(dtype), stored, np.zeros(stored.shape, dtype)
            self.values |= dict(zip(named, parts, strict=True))
            along = {} if axis is None else {"axis": axis}
            self.written[key] = self._node("DequantizeLinear", dequantized, named, dequantized, **along)
        return self.written[key]

    def _base(self, name: str) -> str:
        """Take a name for a pair: `name`, with a number where that is taken."""
        base = free_name(name, self.bases)
        self.bases.add(base)
        return base

    def _node(self, operator: str, name: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Write a node; return its output."""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def _require_one_scale(self, node: NodeProto, kernel: Encoding) -> None:
        """Refuse a batch of matrices with a scale for each channel, which runtimes do not compute."""
        if node.op_type == "MatMul" and self.values[node.input[1]].ndim > 2 and kernel.axis is not None:
            raise InvalidInput(
                f'"{node.input[1]}" is a batch of matrices with a scale for each channel, and runtimes have '
                f'one scale for those: leave "{node.name}" in floating point with a qt.Rule(..., skip=True), '
                "or train it with one scale, qt.QuantSpec(axis=None)"
            )

    def _require_opset(self, bits: int, name: str) -> None:
        """Refuse integers that the opset does not have."""
        width = storage_bits(bits)
        if self.opset < FIRST_OPSET[width]:
            raise InvalidInput(
                f'"{name}" on {bits} bits needs INT{width}, which ONNX has from opset {FIRST_OPSET[width]}: '
                f"export with that opset; this graph has {self.opset}"
            )
