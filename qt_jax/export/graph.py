"""Reading an ONNX graph and rebuilding it: what every pass of this package is written with.

Constants carry their origin in their name: `params/stem/kernel` is a leaf of the variables, and whatever a
pass computes from it is called `params/stem/kernel#<how>`, so that `naming` can still see the Flax path.

Large constants kept beside the graph while passes rewrite it.

A pass makes a new ModelProto, and a ModelProto owns a copy of every weight. Inside `aside()` a large constant
is a reference instead, ONNX's external data with a location in this process, and nothing is copied.

Files that appear whole or not at all.
"""

import math
import os
from collections import Counter
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

LARGE = 4096
"""Bytes from which on a constant is kept aside."""

_kept: ContextVar[dict[str, np.ndarray] | None] = ContextVar("weights_kept_aside", default=None)


@contextmanager
def aside() -> Iterator[None]:
    """Keep large constants beside the models that are built inside; `attached` puts them in again."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def tensor_of(value: np.ndarray, name: str) -> TensorProto:
    """The initializer `name`: a copy of `value`, or inside `aside` a reference to it if it is large."""
    kept = _kept.get()
    if kept is None or value.nbytes < LARGE:
        return numpy_helper.from_array(value, name)
    location = f"memory:{id(value)}"
    kept[location] = value
    tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor.external_data.add(key="location", value=location)
    return tensor


def value_of(tensor: TensorProto) -> np.ndarray:
    """The value of an initializer, wherever it is kept."""
    kept = _kept.get()
    if kept is not None and tensor.data_location == TensorProto.EXTERNAL:
        return kept[tensor.external_data[0].value]
    return numpy_helper.to_array(tensor)


def attached(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the weights that were kept aside copied into it."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(value_of(tensor), tensor.name))
    return whole


SHAPE_SIZE = 64
"""Constants with no more elements than this may be shapes, axes or pads."""


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The initializers by name."""
    return {tensor.name: value_of(tensor) for tensor in model.graph.initializer}


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes that `node` states, by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def uses(model: onnx.ModelProto) -> Counter[str]:
    """How often each tensor is read, by nodes and as a graph output."""
    read = [name for node in model.graph.node for name in node.input]
    return Counter(read + [output.name for output in model.graph.output])


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The inferred shape of each tensor, 0 for a symbolic dimension; tensors of unknown rank are left out."""
    inferred = shape_inference.infer_shapes(without_weights(model), data_prop=True).graph
    return {
        entry.name: tuple(dimension.dim_value for dimension in entry.type.tensor_type.shape.dim)
        for entry in (*inferred.input, *inferred.value_info, *inferred.output)
        if entry.type.tensor_type.HasField("shape")
    } | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The ONNX element type of each tensor that is known."""
    inferred = shape_inference.infer_shapes(without_weights(model)).graph
    known = (*inferred.input, *inferred.value_info, *inferred.output)
    return {entry.name: entry.type.tensor_type.elem_type for entry in known} | {
        tensor.name: tensor.data_type for tensor in model.graph.initializer
    }


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with its larger constants as inputs: shape inference copies what it is given, several times."""
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
    """`node`; for GroupNormalization, whose shape ONNX does not infer, one that keeps the shape too."""
    if node.op_type != "GroupNormalization":
        return node
    return helper.make_node("Identity", node.input[:1], node.output)


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the shape of every tensor recorded; raises InvalidInput where they contradict."""
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


def derived(name: str, how: str) -> str:
    """The name of a constant computed from the constant `name`."""
    return f"{name}#{how}"


def origin(name: str) -> str:
    """The leaf of the variables (`params/stem/kernel`) from which the constant `name` was computed.

    >>> origin(derived("params/stem/kernel", "Transpose_1"))
    'params/stem/kernel'
    """
    return name.partition("#")[0]


def common_origin(names: Iterable[str]) -> str:
    """The leaf that constants stem from; of leaves of one name in several modules, that name in the module
    that holds these; "" where there is none.

    >>> common_origin(["params/cell/hi/kernel", "params/cell/hf/kernel#0"])
    'params/cell/kernel'
    """
    origins = sorted({origin(name) for name in names})
    if len(origins) < 2:
        return "".join(origins)
    paths = [name.split("/") for name in origins]
    modules = zip(*(path[:-1] for path in paths), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, modules)]
    one_leaf = len({path[-1] for path in paths}) == 1
    return "/".join([*shared, paths[0][-1]]) if one_leaf and shared else ""


def flax_path(name: str) -> str:
    """The path in its collection of the leaf from which the constant `name` stems; "" for any other constant.

    >>> flax_path("params/stem/kernel#Transpose_1")
    'stem/kernel'
    """
    return origin(name).partition("/")[2]


def rewired(node: NodeProto, inputs: Iterable[str], outputs: Iterable[str] | None = None) -> NodeProto:
    """A copy of `node` that reads `inputs` and, where given, writes `outputs`."""
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
    """`model` with other nodes and constants.

    Nodes that no output depends on, constants that no node reads, inputs that have become constants and
    every recorded intermediate shape are left out.

    Args:
      model: gives inputs, outputs and opset.
      nodes: in topological order.
      values: the constants by name; those that no node reads are dropped.
    """
    needed = {output.name for output in model.graph.output}
    live: list[NodeProto] = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(node.input)
    graph = helper.make_graph(
        live[::-1],
        "main_graph",
        [entry for entry in model.graph.input if entry.name not in values],
        list(model.graph.output),
        [tensor_of(value, name) for name, value in values.items() if name in needed],
    )
    opset = list(model.opset_import)
    return helper.make_model(
        graph, producer_name="qt_jax", opset_imports=opset, ir_version=helper.find_min_ir_version_for(opset)
    )


def fuse(
    model: onnx.ModelProto,
    values: dict[str, np.ndarray],
    operators: frozenset[str],
    fused: Callable[[NodeProto, NodeProto], NodeProto | None],
) -> onnx.ModelProto:
    """Replace a node and the one before it by `fused(node, before)`, where it has a result.

    Asked only for nodes among `operators`, and for pairs in which the first node's output is read by the
    second alone.
    """
    read = uses(model)
    nodes: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if node.op_type in operators:
            before = [nodes[name] for name in node.input if name in nodes and read[name] == 1]
            node = next(filter(None, (fused(node, candidate) for candidate in before)), node)
        nodes[node.output[0]] = node
    return rebuild(model, nodes.values(), values)


def save(model: onnx.ModelProto, path: str | os.PathLike) -> None:
    """Write `model` to `path`, whole or not at all; a file already there is replaced at the end."""
    with staged(path) as temporary:
        onnx.save(model, temporary)
