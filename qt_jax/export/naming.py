"""Name nodes, tensors and initializers by their Flax path, so that a reader can trace them back.

`name_by_path` gives the names, and writes down which leaf each kernel is. `kernel_origins` reads that.
`free_name` numbers a name that is taken. `leaf_of` finds the leaf that an exported constant is named after.
`note_outputs` writes down which output is what the forward returns where, and `output_places` reads that.
"""

import dataclasses
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import chain, count

import numpy as np
import onnx
from onnx import NodeProto, defs

from qt_jax.export import graph
from qt_jax.export.operators import NORMALIZING, WEIGHTED

MODULES = WEIGHTED | NORMALIZING | {"Gather"}
"""Operators that stand for a Flax module where a leaf of the variables is among their inputs."""

KERNELS = "qt_jax.kernels"
"""Key of the model's metadata that holds, in JSON, the origin and the gain of each kernel by name.
Metadata of a single tensor would be standard from IR version 10 on only."""

FOLDED_INPUTS = "qt_jax.folded_inputs"
"""Key of the model's metadata that lists, in JSON, the leaves of the kernels into which an operator before
the layer was folded: those layers read another tensor than in training."""

OUTPUTS = "qt_jax.outputs"
"""Key of the model's metadata that maps, in JSON, the name of each output to its path in what the forward
returns. The names alone do not tell: a user may give one entry of a dict the key of another."""

NUMBER = re.compile(r"_\d+$")
"""Ending of a name that was taken already."""


def name_by_path(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every node, tensor and constant a name made of Flax paths.

    - A convolution or Gemm is named after its module (`stage1_block1/conv1`).
    - Its weights are named after their leaves (`stage1_block1/conv1/kernel`).
    - A node without weights takes the scope of the latest node that feeds it, and its operator
      (`stage1_block1/Relu`).
    - Any other constant takes the name of its node, and the operator's name for it
      (`stage1_block1/Clip/min`).
    - A tensor has the name of its node. Graph inputs and outputs keep their names.
    - A name that is taken gets `_1`, `_2` and so on. Equal constants of one name and origin become one.

    The origins and gains of kernels become metadata of the model. Those of other constants are dropped.
    """
    values = graph.constants(model)
    interface = {entry.name for entry in (*model.graph.input, *model.graph.output)}
    tensors = {name: name for name in interface}
    order = {name: -1 for name in interface}
    scopes = {name: "" for name in interface}
    taken = set(interface)
    named: dict[str, np.ndarray] = {}
    origins: dict[str, str] = {}
    kernels: dict[str, tuple[str, float | list[float] | None]] = {}
    nodes = []

    def constant(base: str, source: str) -> str:
        value, origin = values[source], values.origins.get(source, "")
        name = next(
            candidate
            for candidate in _candidates(base)
            if candidate not in taken
            or (origins.get(candidate) == origin and np.array_equal(named[candidate], value))
        )
        named[name], origins[name] = value, origin
        taken.add(name)
        return name

    for position, node in enumerate(model.graph.node):
        feeds = [name for name in node.input if name and name not in values]
        feed = max(feeds, key=order.__getitem__, default="")
        base, scope = _place(node, values, scopes.get(feed, ""), taken)
        occupied = taken.difference(node.output)  # the module `logits` may write the tensor `logits`
        name = free_name(base, occupied)
        taken.add(name)
        inputs = [tensors.get(source, "") for source in node.input]
        for index, source in enumerate(node.input):
            if source in values:
                base = values.flax_path(source) or f"{name}/{_argument(node, index)}"
                inputs[index] = constant(base, source)
        for index, output in enumerate(node.output):
            tensors.setdefault(output, f"{name}/{index}" if index else name)
            scopes[output], order[output] = scope, position
        copy = graph.rewired(node, inputs, [tensors[output] for output in node.output])
        copy.name = name
        nodes.append(copy)
        if node.op_type in WEIGHTED and node.input[1] in values.origins:
            gain = values.gains.get(node.input[1])
            kernels[inputs[1]] = values.origins[node.input[1]], None if gain is None else gain.tolist()
    result = graph.rebuild(model, nodes, named)
    result.metadata_props.add(key=KERNELS, value=json.dumps(kernels))
    return result


@dataclasses.dataclass(frozen=True)
class KernelOrigin:
    """Describe the leaf that a kernel of an exported graph was made from.

    Attributes:
      path: Path of the leaf in its collection, `stem/kernel`.
      steps: The step of nn.scan whose part of a stacked leaf it is; several where one scan is inside another.
      gain: What the leaf was multiplied by, as `graph.Constants.gains` holds it. None where the kernel is not
        the leaf with each output channel multiplied by one number.
    """

    path: str
    steps: tuple[int, ...]
    gain: np.ndarray | None


def kernel_origins(model: onnx.ModelProto) -> dict[str, KernelOrigin]:
    """Read the origins of the kernels of a graph from `name_by_path`, by initializer."""
    written = next((entry.value for entry in model.metadata_props if entry.key == KERNELS), "{}")
    found = {}
    for name, (origin, gain) in json.loads(written).items():
        leaf = graph.STEPS.sub("", origin)
        steps = tuple(map(int, re.findall(r"\d+", origin.removeprefix(leaf))))
        gains = None if gain is None else np.array(gain, np.float64)
        found[name] = KernelOrigin(leaf.partition("/")[2], steps, gains)
    return found


def folded_inputs(model: onnx.ModelProto) -> set[str]:
    """Return the paths of the kernels into which an operator before their layer was folded."""
    written = next((entry.value for entry in model.metadata_props if entry.key == FOLDED_INPUTS), "[]")
    return {graph.STEPS.sub("", origin).partition("/")[2] for origin in json.loads(written)}


def note_outputs(model: onnx.ModelProto, paths: Mapping[str, str]) -> None:
    """Write down, in the metadata of a graph, the path of each output in what the forward returns."""
    model.metadata_props.add(key=OUTPUTS, value=json.dumps(dict(paths)))


def output_places(model: onnx.ModelProto, paths: Sequence[str]) -> list[int] | None:
    """Return for each output of a graph its place among the leaves that the forward returns.

    Args:
      model: Graph from `to_onnx`.
      paths: Path of each leaf, from `qt_jax.export.lowering.output_paths`.

    Returns:
      The places; None where the graph does not tell, because it comes from elsewhere or was renamed, or
      another forward is given.
    """
    written = next((entry.value for entry in model.metadata_props if entry.key == OUTPUTS), "{}")
    noted = json.loads(written)
    found = [noted.get(entry.name) for entry in model.graph.output]
    return [paths.index(path) for path in found] if sorted(paths) == sorted(map(str, found)) else None


def _place(node: NodeProto, values: graph.Constants, scope: str, taken: set[str]) -> tuple[str, str]:
    """Return the name that `node` wants, and the scope of its output: the module that called it."""
    leaves = filter(None, map(values.flax_path, node.input))
    module = next((path.rpartition("/")[0] for path in leaves), "")
    caller = module.rpartition("/")[0]
    if module and node.op_type in MODULES:
        return module, caller
    base = f"{module or scope}/{node.op_type}".removeprefix("/")
    if module:
        scope = caller if module in taken else module  # the bias of a layer that stands already, or a leaf
    return base, scope


def _argument(node: NodeProto, index: int) -> str:
    """Return the operator's own name for an input of `node`, in lower case."""
    formal = defs.get_schema(node.op_type).inputs
    return formal[min(index, len(formal) - 1)].name.lower()


def free_name(base: str, taken: Container[str]) -> str:
    """Return `base`, or the first of `base_1`, `base_2` and so on that is not taken.

    >>> free_name("Relu", {"Relu", "Relu_1"})
    'Relu_2'
    """
    return next(candidate for candidate in _candidates(base) if candidate not in taken)


def _candidates(base: str) -> Iterator[str]:
    """Yield `base`, then `base` with numbers."""
    return chain([base], (f"{base}_{number}" for number in count(1)))


def leaf_of(name: str, leaves: Container[str]) -> str:
    """Return the leaf that a constant of an exported graph is named after.

    Args:
      name: Name that `name_by_path` gave.
      leaves: Paths in one collection, such as `stem/kernel`.

    Returns:
      `name` where it is a leaf, otherwise `name` without the number at its end.

    >>> leaf_of("stem/kernel_1", {"stem/kernel"}), leaf_of("kernel_1", {"kernel_1"})
    ('stem/kernel', 'kernel_1')
    """
    return name if name in leaves else NUMBER.sub("", name)
