"""Read an ONNX graph and rebuild it: the tools that every pass of this package is written with.

A pass is a function from ModelProto to ModelProto. It reads the constants (`constants`), makes a list of
nodes and puts both together (`rebuild`). A constant remembers the leaf of the Flax variables from which it
was computed (`Constants.origins`). Between passes that origin is the metadata `ORIGIN` of the initializer.
The last pass, `naming.name_by_path`, turns it into a name and drops it.

Every pass makes a new ModelProto, and a ModelProto owns a copy of every weight. Inside `weights_by_reference`
a large constant is a reference instead: external data of ONNX with a location in this process. Nothing is
copied then.

This module and `operators`, `layout`, `rewrites` and `folding` import numpy, onnx and modules of qt_jax that
need no more, because vendors' environments hold nothing else.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import takewhile
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

from qt_jax.errors import InvalidInput
from qt_jax.files import staged

ORIGIN = "qt_jax.origin"
"""Key of an initializer's metadata: the leaf of the variables from which it was computed."""

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
        A constant that stems from no leaf is absent.

    >>> values = Constants()
    >>> values.add("weight", np.ones((2, 3)), "params/stem/kernel")
    'weight'
    >>> values.origins[values.derive("weight", "transposed", values["weight"].T)]
    'params/stem/kernel'
    """

    def __init__(self, values: Mapping[str, np.ndarray] = {}, origins: Mapping[str, str] = {}):
        super().__init__(values)
        self.origins = dict(origins)

    def add(self, name: str, value: np.ndarray, origin: str = "") -> str:
        """Add a constant that stems from the leaf `origin`, if one is given; return its name."""
        self[name] = value
        if origin:
            self.origins[name] = origin
        return name

    def derive(self, source: str, how: str, value: np.ndarray) -> str:
        """Add a constant that is computed from the constant `source`; return its name.

        Args:
          source: Name of a constant, or any word for one that stems from none.
          how: Tells apart the constants that are derived from one source.
          value: The new constant. It has the origin of `source`.
        """
        return self.add(f"{source}#{how}", value, self.origins.get(source, ""))

    def flax_path(self, name: str) -> str:
        """Return the path of a constant's leaf in its collection; "" where it stems from no leaf.

        >>> Constants(origins={"weight": "params/stem/kernel"}).flax_path("weight")
        'stem/kernel'
        """
        return self.origins.get(name, "").partition("/")[2]

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
        origins = sorted({self.origins[name] for name in names if name in self.origins})
        if len(origins) < 2:
            return "".join(origins)
        paths = [name.split("/") for name in origins]
        modules = zip(*(path[:-1] for path in paths), strict=False)
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, modules)]
        one_leaf = len({path[-1] for path in paths}) == 1
        return "/".join([*shared, paths[0][-1]]) if one_leaf and shared else ""


def constants(model: onnx.ModelProto) -> Constants:
    """Return the initializers by name, with their origins."""
    values = Constants()
    for tensor in model.graph.initializer:
        metadata = getattr(tensor, "metadata_props", ())  # absent before onnx 1.16
        origin = next((entry.value for entry in metadata if entry.key == ORIGIN), "")
        values.add(tensor.name, _value(tensor), origin)
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
            "otherwise a layer works on more axes than jax2onnx lowers: reshape before it"
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
      model: Gives inputs, outputs and opset.
      nodes: Nodes in topological order.
      values: Constants by name. The origins of `Constants` become metadata of the initializers.
    """
    needed = {output.name for output in model.graph.output}
    live: list[NodeProto] = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(node.input)
    origins = values.origins if isinstance(values, Constants) else {}
    graph = helper.make_graph(
        live[::-1],
        "main_graph",
        [entry for entry in model.graph.input if entry.name not in values],
        list(model.graph.output),
        [_tensor(value, name, origins.get(name, "")) for name, value in values.items() if name in needed],
    )
    opset = list(model.opset_import)
    return helper.make_model(
        graph, producer_name="qt_jax", opset_imports=opset, ir_version=helper.find_min_ir_version_for(opset)
    )


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
            tensor.CopyFrom(numpy_helper.from_array(_value(tensor), tensor.name))
    return whole


def _tensor(value: np.ndarray, name: str, origin: str) -> TensorProto:
    """Make an initializer: a copy of `value`, or inside `weights_by_reference` a reference if it is large."""
    kept = _kept.get()
    if kept is None or value.nbytes < LARGE:
        tensor = numpy_helper.from_array(value, name)
    else:
        location = f"memory:{id(value)}"
        kept[location] = value
        tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor.external_data.add(key="location", value=location)
    if origin:
        tensor.metadata_props.add(key=ORIGIN, value=origin)
    return tensor


def _value(tensor: TensorProto) -> np.ndarray:
    """Return the value of an initializer, wherever it is kept."""
    kept = _kept.get()
    if kept is not None and tensor.data_location == TensorProto.EXTERNAL:
        return kept[tensor.external_data[0].value]
    return numpy_helper.to_array(tensor)


def save(model: onnx.ModelProto, path: str | os.PathLike) -> None:
    """Write `model` to `path`, whole or not at all; a file already there is replaced at the end."""
    with staged(path) as temporary:
        onnx.save(model, temporary)
