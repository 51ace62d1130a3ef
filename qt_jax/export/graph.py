"""Read an ONNX graph and rebuild it: the tools that every pass of this package is written with.

A pass is a function from ModelProto to ModelProto. It reads the constants (`constants`), makes a list of
nodes and puts both together (`rebuild`). A constant remembers the leaf of the Flax variables from which it
was computed (`Constants.origins`), and what the leaf was multiplied by (`Constants.gains`). Between passes
these are the metadata `ORIGIN` and `GAIN` of the initializer. The last pass, `naming.name_by_path`, turns
the origin into a name, and lists both in the metadata of the model.

Every pass makes a new ModelProto, and a ModelProto owns a copy of every weight. Inside `weights_by_reference`
a large constant is a reference instead: external data of ONNX with a location in this process. Nothing is
copied then.

This module and `operators`, `layout`, `placement`, `rewrites`, `merging`, `sharing`, `folding` and
`commuting` import numpy, onnx and modules of qt_jax that need no more, because vendors' environments hold
nothing else.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import takewhile
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from qt_jax.errors import InvalidInput

ORIGIN = "qt_jax.origin"
"""Key of an initializer's metadata: the leaf of the variables from which it was computed."""

GAIN = "qt_jax.gain"
"""Key of an initializer's metadata: what its leaf was multiplied by, in JSON."""

STEPS = re.compile(r"(\[\d+\])*$")
"""Ending of an origin: the steps of nn.scan whose part of a stacked leaf the constant is."""

LARGE = 4096
"""Size in bytes from which on a constant is kept by reference."""

SHAPE_SIZE = 64
"""Largest number of elements of a constant that may be a shape, axes or pads."""

Shapes = dict[str, tuple[int, ...]]
"""Maps a tensor to its sizes; a symbolic size is 0."""

_kept: ContextVar[dict[str, np.ndarray] | None] = ContextVar("weights_kept_by_reference", default=None)


class Constants(dict[str, np.ndarray]):
    """Map the name of each constant to its value, and remember where it comes from.

    Attributes:
      origins: Maps a constant to the leaf of the variables (`params/stem/kernel`) from which it was computed.
        Of a leaf that nn.scan stacks, `params/layers/kernel[2]` is the part of step 2, and `[2][0]` that of
        step 0 of a scan inside step 2. A constant that stems from no leaf is absent.
      gains: Maps a constant that has all elements of its leaf, or of its step's part, in any layout, to what
        they were multiplied by: float64, `()` for one number, or `(channels,)` for one of each output
        channel. A constant that was computed from its leaf in another way is absent.

    >>> values = Constants()
    >>> values.add("params/stem/kernel", np.ones((2, 3)), "params/stem/kernel")
    'params/stem/kernel'
    >>> kernel = values.derive("params/stem/kernel", "doubled", np.full((3, 2), 2.0), gain=np.full(3, 2.0))
    >>> values.origins[kernel], values.gains[kernel].tolist()
    ('params/stem/kernel', [2.0, 2.0, 2.0])
    """

    def __init__(self, values: Mapping[str, np.ndarray] = {}, origins: Mapping[str, str] = {}):
        super().__init__(values)
        self.origins = dict(origins)
        self.gains: dict[str, np.ndarray] = {}

    def add(self, name: str, value: np.ndarray, origin: str = "", gain: np.ndarray | None = None) -> str:
        """Add a constant and return its name.

        Args:
          name: A constant that is called like its origin is the leaf itself, and has the gain 1.
          value: Its value.
          origin: The leaf from which it stems, "" for none.
          gain: As `gains` holds it; None where it is unknown.
        """
        self[name] = value
        self.origins.pop(name, None)
        self.gains.pop(name, None)
        if origin:
            self.origins[name] = origin
        if name == origin:
            gain = np.ones(())
        if gain is not None:
            self.gains[name] = gain
        return name

    def derive(self, source: str, how: str, value: np.ndarray, gain: np.ndarray | None = None) -> str:
        """Add a constant that is made from the constant `source`; return its name.

        Args:
          source: Name of a constant, or any word for one that stems from none.
          how: Tells apart the constants that are derived from one source.
          value: The new constant: the elements of `source` in another layout, multiplied by `gain` where one
            is given. It has the origin of `source`.
          gain: float64 `(channels,)`, one number for each output channel.
        """
        product = self.gains.get(source)
        if product is not None and gain is not None:
            product = product * gain
        return self.add(f"{source}#{how}", value, self.origins.get(source, ""), product)

    def flax_path(self, name: str) -> str:
        """Return the path of a constant's leaf in its collection; "" where it stems from no leaf.

        >>> Constants(origins={"weight": "params/stem/kernel[3]"}).flax_path("weight")
        'stem/kernel'
        """
        return STEPS.sub("", self.origins.get(name, "")).partition("/")[2]

    def common_origin(self, names: Iterable[str]) -> str:
        """Return the leaf from which several constants stem.

        Leaves of one name in several modules give that name in the module that holds these.

        Args:
          names: Names of constants. Those without an origin do not count.

        Returns:
          The leaf, or "" where there is none or where the constants have no leaf in common.

        >>> origins = {"a": "params/cell/hi/kernel", "b": "params/cell/hf/kernel"}
        >>> Constants(origins=origins).common_origin(["a", "b", "c"])
        'params/cell/kernel'
        """
        return common_leaf(self.origins[name] for name in names if name in self.origins)


def common_leaf(origins: Iterable[str]) -> str:
    """Return the leaf from which values of these origins stem together, as `Constants.common_origin` does.

    >>> common_leaf(["params/cell/hi/kernel", "params/cell/hf/kernel", ""])
    'params/cell/kernel'
    """
    leaves = sorted({origin for origin in origins if origin})
    if len(leaves) < 2:
        return "".join(leaves)
    paths = [name.split("/") for name in leaves]
    modules = zip(*(path[:-1] for path in paths), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, modules)]
    one_leaf = len({path[-1] for path in paths}) == 1
    return "/".join([*shared, paths[0][-1]]) if one_leaf and shared else ""


def constants(model: onnx.ModelProto) -> Constants:
    """Return the initializers by name, with their origins and gains."""
    values = Constants()
    for tensor in model.graph.initializer:
        metadata = getattr(tensor, "metadata_props", ())  # absent before onnx 1.16
        held = {entry.key: entry.value for entry in metadata}
        gain = np.array(json.loads(held[GAIN]), np.float64) if GAIN in held else None
        values.add(tensor.name, _value(tensor), held.get(ORIGIN, ""), gain)
    return values


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes that `node` states, by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def uses(model: onnx.ModelProto) -> Counter[str]:
    """Count how often each tensor is read, by nodes and as a graph output."""
    read = [name for node in model.graph.node for name in node.input]
    return Counter(read + [output.name for output in model.graph.output])


def readers(model: onnx.ModelProto) -> dict[str, list[NodeProto]]:
    """Return the nodes that read each tensor; a node that reads it twice is listed twice."""
    found: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            found[name].append(node)
    return found


def shapes(model: onnx.ModelProto) -> Shapes:
    """Infer the shape of each tensor, with 0 for a symbolic size.

    Tensors of unknown rank are left out.
    """
    inferred = shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    return {
        entry.name: tuple(dimension.dim_value for dimension in entry.type.tensor_type.shape.dim)
        for entry in (*inferred.input, *inferred.value_info, *inferred.output)
        if entry.type.tensor_type.HasField("shape")
    } | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Infer the ONNX element type of each tensor for which that is possible."""
    inferred = shape_inference.infer_shapes(without_weights(model)).graph
    known = (*inferred.input, *inferred.value_info, *inferred.output)
    return {entry.name: entry.type.tensor_type.elem_type for entry in known} | {
        tensor.name: tensor.data_type for tensor in model.graph.initializer
    }


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Record the shape of every tensor.

    Raises:
      InvalidInput: The shapes contradict each other.
    """
    try:
        inferred = shape_inference.infer_shapes(
            without_weights(model), check_type=True, strict_mode=True, data_prop=True
        ).graph
    except shape_inference.InferenceError as error:
        raise InvalidInput(
            f"the shapes of the graph contradict each other: {error}. State input_shape without batch; "
            "otherwise please report the network"
        ) from error
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    del result.graph.output[:]
    result.graph.value_info.extend(inferred.value_info)
    result.graph.output.extend(inferred.output)
    return result


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn the larger constants into inputs, because shape inference copies them several times."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(map(_known_to_inference, model.graph.node))
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SHAPE_SIZE:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return light


def _known_to_inference(node: NodeProto) -> NodeProto:
    """Replace GroupNormalization, whose shape ONNX does not infer, by a node that keeps the shape too."""
    if node.op_type != "GroupNormalization":
        return node
    return helper.make_node("Identity", node.input[:1], node.output)


def names_read(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads, by the graphs inside it too (with names that are made there)."""
    yield from filter(None, node.input)
    for inside in graphs_inside(node):
        for inner in inside.node:
            yield from names_read(inner)
        yield from (value.name for value in inside.output)


def graphs_inside(node: NodeProto) -> list[GraphProto]:
    """Return the graphs that a node holds: the branches of an If, the body of a Loop or Scan."""
    return [inside for item in node.attribute for inside in ([item.g] if item.HasField("g") else item.graphs)]


def rewired(node: NodeProto, inputs: Iterable[str], outputs: Iterable[str] | None = None) -> NodeProto:
    """Copy `node` with other inputs and, where given, other outputs."""
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(inputs)
    if outputs is not None:
        del copy.output[:]
        copy.output.extend(outputs)
    return copy


def rebuild(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], values: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """Rebuild `model` with other nodes and constants.

    The result leaves out nodes that no output depends on, constants that no node reads, inputs that have
    become constants and every recorded intermediate shape.

    Args:
      model: Gives inputs, outputs, opset and the metadata of the model.
      nodes: Nodes in topological order.
      values: Constants by name. The origins and gains of `Constants` become metadata of the initializers.
    """
    needed = {output.name for output in model.graph.output}
    live: list[NodeProto] = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(names_read(node))
    graph = helper.make_graph(
        live[::-1],
        "main_graph",
        [entry for entry in model.graph.input if entry.name not in values],
        list(model.graph.output),
        [_initializer(name, values) for name in values if name in needed],
    )
    opset = list(model.opset_import)
    rebuilt = helper.make_model(
        graph,
        producer_name="qt_jax",
        opset_imports=opset,
        ir_version=helper.find_min_ir_version_for(opset, ignore_unknown=True),
    )
    rebuilt.metadata_props.extend(model.metadata_props)
    return rebuilt


def fuse(
    model: onnx.ModelProto,
    values: Mapping[str, np.ndarray],
    operators: frozenset[str],
    fused: Callable[[NodeProto, NodeProto], NodeProto | None],
) -> onnx.ModelProto:
    """Replace a node and the one before it by `fused(node, before)`, where that returns a node.

    Only nodes among `operators` are tried, and only with a node before them whose output nothing else reads.
    """
    read = uses(model)
    nodes: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if node.op_type in operators:
            before = [nodes[name] for name in node.input if name in nodes and read[name] == 1]
            node = next(filter(None, (fused(node, candidate) for candidate in before)), node)
        nodes[node.output[0]] = node
    return rebuild(model, nodes.values(), values)


@contextmanager
def weights_by_reference() -> Iterator[None]:
    """Keep large constants outside the models that are built inside; `with_weights` puts them in again."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy the weights that were kept by reference into the model."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            value = _value(tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = numpy_helper.tobytes_little_endian(value)
    return whole


def _initializer(name: str, values: Mapping[str, np.ndarray]) -> TensorProto:
    """Make an initializer of one constant, with its origin and its gain as metadata."""
    tensor = _tensor(values[name], name)
    if isinstance(values, Constants) and name in values.origins:
        tensor.metadata_props.add(key=ORIGIN, value=values.origins[name])
        if name in values.gains:
            tensor.metadata_props.add(key=GAIN, value=json.dumps(values.gains[name].tolist()))
    return tensor


def _tensor(value: np.ndarray, name: str) -> TensorProto:
    """Make a tensor: a copy of `value`, or inside `weights_by_reference` a reference if it is large."""
    kept = _kept.get()
    if kept is None or value.nbytes < LARGE:
        tensor = numpy_helper.from_array(value, name)
    else:
        location = f"memory:{id(value)}"
        kept[location] = value
        tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor.external_data.add(key="location", value=location)
    return tensor


def _value(tensor: TensorProto) -> np.ndarray:
    """Return the value of an initializer, wherever it is kept."""
    kept = _kept.get()
    if kept is not None and tensor.data_location == TensorProto.EXTERNAL:
        return kept[tensor.external_data[0].value]
    return numpy_helper.to_array(tensor)
